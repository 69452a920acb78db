// Detections drawn on a canvas: outlines in the color of the class, and tags that stay inside the picture.

const FONT = "system-ui, sans-serif";

/** Black or white, whichever contrasts more with a color such as "#ff385c" (WCAG 2, relative luminance). */
function inkOn(color) {
  const [red, green, blue] = [1, 3, 5].map((at) => {
    const share = parseInt(color.slice(at, at + 2), 16) / 255;
    return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) ** 2 >= 1.05 * 0.05 ? "#000000" : "#ffffff";
}

const overlap = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;

/** The place of a tag: above its box, else inside, else below, where it is in the picture and on no other tag. */
function place(w, h, box, width, height, taken) {
  const spots = [
    [box.xmin, box.ymin - h],
    [box.xmin, box.ymin],
    [box.xmax - w, box.ymin - h],
    [box.xmin, box.ymax],
    [box.xmax - w, box.ymin],
    [box.xmin, box.ymax - h],
  ].map(([x, y]) => ({ x, y, w, h }));
  const inside = spots.filter(({ x, y }) => x >= 0 && y >= 0 && x + w <= width && y + h <= height);
  const moved = {
    x: Math.max(0, Math.min(spots[0].x, width - w)),
    y: Math.max(0, Math.min(spots[0].y, height - h)),
    w,
    h,
  };
  return [...inside, moved].find((spot) => !taken.some((other) => overlap(spot, other))) ?? inside[0] ?? moved;
}

/**
 * Draws a frame and its detections over a whole canvas.
 *
 * frame: anything drawImage takes. detections: {score, label, box, color, track}, boxes in a picture of size.width x
 * size.height pixels; best first, and drawn over those behind. The track is the id of an object that is followed.
 */
export function draw(canvas, frame, size, detections) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.drawImage(frame, 0, 0, width, height);
  const [across, down] = [width / size.width, height / size.height];
  const short = Math.min(width, height);
  const line = Math.max(2, Math.round(short / 240));
  const text = Math.max(11, Math.round(short / 34));
  const pad = Math.round(text * 0.35);
  const scaled = detections.map((one) => ({
    ...one,
    box: {
      xmin: one.box.xmin * across,
      ymin: one.box.ymin * down,
      xmax: one.box.xmax * across,
      ymax: one.box.ymax * down,
    },
  }));
  context.lineJoin = "round";
  for (const { box, color } of [...scaled].reverse()) {
    const rectangle = [box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin];
    context.strokeStyle = "rgb(0 0 0 / 0.5)"; // an outline of the background's own color is seen by its dark edge
    context.lineWidth = line + 2;
    context.strokeRect(...rectangle);
    context.strokeStyle = color;
    context.lineWidth = line;
    context.strokeRect(...rectangle);
  }
  context.font = `600 ${text}px ${FONT}`;
  context.textBaseline = "middle";
  const taken = [];
  for (const { box, color, label, score, track } of scaled) {
    const name = label.length > 48 ? `${label.slice(0, 47)}…` : label;
    const words = [name, track === undefined ? "" : `#${track}`, score.toFixed(2)].filter(Boolean).join(" ");
    const w = Math.ceil(context.measureText(words).width) + 2 * pad;
    const spot = place(w, Math.round(text * 1.5), box, width, height, taken);
    taken.push(spot);
    context.fillStyle = color;
    context.beginPath();
    context.roundRect(spot.x, spot.y, spot.w, spot.h, Math.round(text / 5));
    context.fill();
    context.fillStyle = inkOn(color);
    context.fillText(words, spot.x + pad, spot.y + spot.h / 2 + 1);
  }
}
