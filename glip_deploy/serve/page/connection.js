// The websocket of the page. A message is JSON, or a JSON header with a picture behind it in one binary message:
// the header's length in four bytes (big endian), the header in UTF-8, the picture's bytes.

const SLOWEST_RETRY = 10000;

export function pack(header, picture) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const out = new Uint8Array(4 + text.length + picture.byteLength);
  new DataView(out.buffer).setUint32(0, text.length);
  out.set(text, 4);
  out.set(new Uint8Array(picture), 4 + text.length);
  return out;
}

export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return { header, picture: new Blob([new Uint8Array(buffer, 4 + length)], { type: "image/jpeg" }) };
}

/**
 * Keeps a connection to the server: opens it, says hello with the token, opens it again when it is lost.
 *
 * handlers.message(header, picture or null) takes what the server says; handlers.state(name, text) is told of
 * "connecting", "open", "refused" (the token is missing or wrong: it waits for `open`) and "lost".
 */
export class Connection {
  constructor(handlers) {
    this.handlers = handlers;
    this.socket = null;
    this.token = "";
    this.wait = 1000;
    this.timer = 0;
  }

  open(token) {
    this.token = token;
    clearTimeout(this.timer);
    this.socket?.close();
    const address = new URL("v1/live", document.baseURI);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    let refused = false;
    this.handlers.state("connecting", "Connecting");
    socket.onopen = () => socket.send(JSON.stringify({ type: "hello", token: this.token }));
    socket.onmessage = (event) => {
      if (socket !== this.socket) return;
      const { header, picture } =
        typeof event.data === "string" ? { header: JSON.parse(event.data), picture: null } : unpack(event.data);
      if (header.type === "welcome") {
        this.wait = 1000;
        this.handlers.state("open", "Connected");
      } else if (header.type === "error" && header.about === "hello") {
        refused = header.token;
        this.handlers.state("refused", header.message);
        return;
      }
      this.handlers.message(header, picture);
    };
    socket.onclose = (event) => {
      if (socket !== this.socket) return;
      this.socket = null;
      if (refused) return;
      const why = event.reason ? `: ${event.reason}` : "";
      this.handlers.state("lost", `Disconnected${why}; trying again`);
      this.timer = setTimeout(() => this.open(this.token), this.wait);
      this.wait = Math.min(2 * this.wait, SLOWEST_RETRY);
    };
  }

  /** Sends a message, with a picture (an ArrayBuffer) if there is one; false while there is no connection. */
  send(header, picture = null) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(picture === null ? JSON.stringify(header) : pack(header, picture));
    return true;
  }
}
