// The visitor's own camera. Nothing leaves the browser but the frames that the page sends to its own server.

const QUALITY = 0.85;

/** The reason why there is no camera, in words that say what to do. */
export function whyNoCamera(error) {
  if (!navigator.mediaDevices) {
    return "the browser gives its camera only to pages from localhost or https; open the page as http://127.0.0.1, or put https in front";
  }
  switch (error?.name) {
    case "NotAllowedError":
      return "the browser may not use the camera; allow it in the address bar, and choose the camera again";
    case "NotFoundError":
    case "OverconstrainedError":
      return "no camera is found; plug one in, and choose it again";
    case "NotReadableError":
      return "the camera is in use by another program; close that, and choose the camera again";
    default:
      return `the camera cannot be used (${error?.message ?? error}); choose another source`;
  }
}

/** Gives frames of a camera as canvases, and their JPEG bytes. */
export class Camera {
  constructor(video) {
    this.video = video;
    this.stream = null;
    this.loop = 0;
  }

  /**
   * Opens a camera, "" for any. onFrame(video) is called for each new picture; onLost when the camera goes away.
   * Rejects as getUserMedia does.
   */
  async open(device, onFrame, onLost) {
    this.close();
    const loop = this.loop;
    if (!navigator.mediaDevices) throw new Error("no camera here");
    const wanted = { width: { ideal: 1280 }, height: { ideal: 720 } };
    if (device) wanted.deviceId = { exact: device };
    else wanted.facingMode = { ideal: "environment" };
    const stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    if (loop !== this.loop) {
      // Another source was chosen while the browser asked.
      for (const track of stream.getTracks()) track.stop();
      return;
    }
    this.stream = stream;
    stream.getVideoTracks()[0].onended = () => {
      if (this.stream === stream) {
        this.close();
        onLost();
      }
    };
    this.video.srcObject = stream;
    await this.video.play();
    const next = () => {
      if (loop !== this.loop) return;
      if (this.video.videoWidth) onFrame(this.video);
      again();
    };
    const again = () =>
      this.video.requestVideoFrameCallback ? this.video.requestVideoFrameCallback(next) : requestAnimationFrame(next);
    again();
  }

  close() {
    this.loop += 1;
    const stream = this.stream;
    this.stream = null;
    this.video.srcObject = null;
    for (const track of stream?.getTracks() ?? []) track.stop();
  }

  /** The cameras there are, as {id, name}; they have names only once one was allowed. */
  async list() {
    const devices = await navigator.mediaDevices.enumerateDevices();
    return devices
      .filter((device) => device.kind === "videoinput")
      .map((device, index) => ({ id: device.deviceId, name: device.label || `Camera ${index + 1}` }));
  }

  get device() {
    return this.stream?.getVideoTracks()[0]?.getSettings().deviceId ?? "";
  }
}

/** A copy of a picture as a canvas, its shortest side at most `side` and its longest at most `longest` pixels. */
export function copyOf(video, side, longest) {
  const [width, height] = [video.videoWidth, video.videoHeight];
  const scale = Math.min(1, side / Math.min(width, height), longest / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(video, 0, 0, canvas.width, canvas.height);
  return canvas;
}

export function jpegOf(canvas) {
  return new Promise((resolve, reject) => {
    canvas.toBlob(
      (blob) => (blob ? resolve(blob.arrayBuffer()) : reject(new Error("the browser cannot write JPEG"))),
      "image/jpeg",
      QUALITY,
    );
  });
}
