// The live page: what the visitor chooses goes to the server, what the server finds is drawn.

import { Camera, copyOf, jpegOf, whyNoCamera } from "./camera.js";
import { Connection } from "./connection.js";
import { draw } from "./drawing.js";

const IN_FLIGHT = 2; // frames of the camera under way at once: one is detected while the next travels
const LEAST_SIDE = 480; // the camera's frames are sent no smaller than this, for the eye's sake
const TYPING_PAUSE = 350; // milliseconds without a key after which a prompt is sent
const LOWEST = 0.05; // the model gives no score below this
const LOG_LENGTH = 1000;

const byId = (id) => document.getElementById(id);
const ui = Object.fromEntries(
  [...document.querySelectorAll("[id]")].map((element) => [
    element.id.replace(/-(\w)/g, (_, letter) => letter.toUpperCase()),
    element,
  ]),
);

const state = {
  welcome: null, // what the server said of itself
  model: "",
  source: "none", // none, server, camera or picture
  pictureName: "",
  paused: false,
  promptId: 0, // the last prompt that was sent
  prompts: new Map(), // id -> what the server said of a prompt that it took
  thresholds: new Map(), // phrase in lower case -> its own threshold
  all: 0.5,
  shown: null, // {frame, size, result}: what is on the canvas
  nextFrame: 1,
  flying: new Map(), // number of a frame under way -> {picture, at}
  encoding: 0, // frames that the browser is compressing
  still: null, // the dropped picture: {bytes, bitmap, frame}
  frameFailed: false, // the message on the page is about a frame, and goes with the next that is answered
  droppedHere: 0, // camera frames that were not sent, as the server is not fast enough for them
  droppedThere: 0,
  frames: 0,
  arrivals: [],
  stages: new Map(),
  log: [], // what happened, in order, for tests and for a curious visitor
};

const camera = new Camera(ui.video);
const connection = new Connection({ message: receive, state: connectionState });
const fold = (phrase) => phrase.replaceAll("_", " ").toLowerCase().split(/\s+/).filter(Boolean).join(" ");

function note(kind, details) {
  state.log.push({ kind, at: performance.now(), ...details });
  if (state.log.length > LOG_LENGTH) state.log.shift();
}

// ---- connection ----

function connectionState(name, text) {
  ui.status.textContent = text;
  document.body.dataset.connection = name;
  if (name === "refused") {
    ui.status.textContent = "Not connected";
    ui.tokenForm.hidden = false;
    say(text);
    ui.token.focus();
  }
  if (name !== "open") {
    state.flying.clear();
    return;
  }
  ui.tokenForm.hidden = true;
  say("");
}

function receive(header, picture) {
  switch (header.type) {
    case "welcome":
      return welcomed(header);
    case "prompt":
      return promptTaken(header);
    case "result":
      return picture === null ? found(header) : foundIn(header, picture);
    case "dropped":
      state.flying.delete(header.frame);
      state.droppedThere = header.dropped;
      return undefined;
    case "source":
      if (state.source === "server") say(header.message);
      return undefined;
    case "error":
      return failed(header);
    default:
      return undefined;
  }
}

function welcomed(welcome) {
  const first = state.welcome === null;
  state.welcome = welcome;
  state.model = welcome.models.includes(state.model) ? state.model : welcome.model;
  ui.model.replaceChildren(...welcome.models.map((name) => new Option(name, name, false, name === state.model)));
  ui.modelChoice.hidden = welcome.models.length < 2;
  if (state.model !== welcome.model) connection.send({ type: "model", model: state.model });
  ui.useServer.hidden = !welcome.source;
  if (welcome.source) ui.useServer.textContent = welcome.source.name;
  ui.status.textContent = `Connected: ${state.model}`;
  state.prompts.clear();
  sendPrompt();
  if (first && welcome.source && state.source === "none") useServer();
  else if (state.source === "server") connection.send({ type: "source", source: state.paused ? null : "server" });
  else if (state.source === "picture") sendPicture();
}

function failed({ about, id, message }) {
  note("error", { about, id, message });
  if (about === "prompt") {
    if (id === state.promptId) promptError(message);
    return;
  }
  if (about === "frame") {
    // One of a source that is not shown any more does not matter.
    if (id !== null && !state.flying.has(id) && id !== state.still?.frame) return;
    state.flying.delete(id);
    state.frameFailed = true;
  }
  say(message);
}

/** Shows what went wrong with anything but the prompt; "" when all is well again. */
function say(message) {
  ui.message.hidden = !message;
  if (ui.message.textContent !== message) ui.message.textContent = message;
}

// ---- prompt and thresholds ----

function promptValue() {
  const text = ui.prompt.value;
  if (!text.trim()) return "";
  if (document.querySelector('input[name="form"]:checked').value === "auto") return text;
  return text.split(/[\n,]/).map((name) => name.trim()).filter(Boolean);
}

let typing = 0;
let lastSent = "";

function promptChanged(now) {
  clearTimeout(typing);
  if (now) sendPromptIfNew();
  else typing = setTimeout(sendPromptIfNew, TYPING_PAUSE);
}

function sendPromptIfNew() {
  if (JSON.stringify(promptValue()) !== lastSent) sendPrompt();
}

function sendPrompt() {
  const prompt = promptValue();
  lastSent = JSON.stringify(prompt);
  state.promptId += 1;
  promptError("");
  if (connection.send({ type: "prompt", id: state.promptId, prompt, ...thresholdsToSend() })) {
    note("prompt sent", { id: state.promptId, prompt });
  }
  if (prompt === "") showPrompt({ id: state.promptId, phrases: [], colors: [], tokens: [], token_count: 0, limit: 0, prompts: 1 });
}

function promptTaken(taken) {
  state.prompts.set(taken.id, taken);
  for (const id of state.prompts.keys()) if (id < taken.id - 20) state.prompts.delete(id);
  note("prompt taken", { id: taken.id, phrases: taken.phrases });
  if (taken.id === state.promptId) showPrompt(taken);
}

function promptError(message) {
  ui.promptError.hidden = !message;
  if (ui.promptError.textContent !== message) ui.promptError.textContent = message;
  ui.prompt.toggleAttribute("aria-invalid", false);
  if (message) ui.prompt.setAttribute("aria-invalid", "true");
}

function showPrompt({ phrases, colors, tokens, token_count: count, limit, prompts }) {
  ui.phrases.replaceChildren(...phrases.map((phrase, index) => phraseRow(phrase, colors[index], index)));
  const several = prompts > 1 ? ` in ${prompts} prompts` : "";
  ui.tokenCount.textContent = count ? `${count} tokens${several}, of ${limit} a prompt` : "No tokens";
  ui.tokenList.replaceChildren(
    ...tokens.map(({ text, class: of }) => {
      const piece = document.createElement("span");
      piece.className = "piece";
      piece.textContent = text;
      if (of !== null) {
        piece.style.borderColor = colors[of];
        piece.title = phrases[of];
      }
      return piece;
    }),
  );
  showCounts();
}

function phraseRow(phrase, color, index) {
  const row = document.createElement("li");
  row.className = "slider";
  row.dataset.phrase = phrase;
  const label = document.createElement("label");
  label.htmlFor = `phrase-${index}`;
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.background = color;
  const count = document.createElement("span");
  count.className = "count";
  label.append(swatch, phrase, " ", count);
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", id: `phrase-${index}`, min: LOWEST, max: 0.95, step: 0.01 });
  const output = document.createElement("output");
  output.htmlFor = slider.id;
  slider.value = thresholdOf(phrase);
  output.textContent = thresholdOf(phrase).toFixed(2);
  slider.oninput = () => {
    state.thresholds.set(fold(phrase), Number(slider.value));
    output.textContent = Number(slider.value).toFixed(2);
    thresholdsChanged();
  };
  row.append(label, slider, output);
  return row;
}

const thresholdOf = (phrase) => state.thresholds.get(fold(phrase)) ?? state.all;

/** A picture stays, so all its boxes are asked for at once, and sliders choose among them without the server. */
function thresholdsToSend() {
  if (state.source === "picture") return { threshold: LOWEST, thresholds: {} };
  return { threshold: state.all, thresholds: Object.fromEntries(state.thresholds) };
}

let thresholdsTimer = 0;

function thresholdsChanged() {
  showShown();
  thresholdsTimer ||= setTimeout(() => {
    thresholdsTimer = 0;
    connection.send({ type: "thresholds", ...thresholdsToSend() });
  }, 100);
}

function allChanged() {
  state.all = Number(ui.all.value);
  ui.allValue.textContent = state.all.toFixed(2);
  state.thresholds.clear();
  for (const row of ui.phrases.children) {
    row.querySelector("input").value = state.all;
    row.querySelector("output").textContent = state.all.toFixed(2);
  }
  thresholdsChanged();
}

// ---- sources ----

function setSource(source) {
  state.source = source;
  state.flying.clear();
  state.still = null;
  state.paused = false;
  state.shown = null;
  state.arrivals = [];
  state.stages.clear();
  state.frames = state.droppedHere = state.droppedThere = 0;
  if (source !== "camera") camera.close();
  ui.cameraChoice.hidden = true;
  ui.stage.dataset.source = source;
  ui.stage.dataset.frame = ui.stage.dataset.prompt = "";
  for (const name of ["server", "camera", "picture"]) {
    byId(`use-${name}`).setAttribute("aria-pressed", String(name === source));
  }
  ui.pause.disabled = source !== "server" && source !== "camera";
  ui.pause.setAttribute("aria-pressed", "false");
  ui.copy.disabled = ui.snapshot.disabled = true;
  ui.json.textContent = "";
  ui.hint.hidden = source !== "none";
  say("");
  connection.send({ type: "source", source: source === "server" ? "server" : null });
  connection.send({ type: "thresholds", ...thresholdsToSend() });
}

function useServer() {
  setSource("server");
}

async function useCamera(device = "") {
  setSource("camera");
  ui.hint.hidden = false;
  ui.hint.textContent = "Waiting for the camera";
  try {
    await camera.open(device, cameraFrame, () => {
      if (state.source === "camera") say("the camera was disconnected; plug it in and choose it again, or another source");
    });
    if (state.source !== "camera") return;
    const cameras = await camera.list();
    ui.camera.replaceChildren(
      ...cameras.map(({ id, name }) => new Option(name, id, false, id === camera.device)),
    );
    ui.cameraChoice.hidden = cameras.length < 2;
  } catch (error) {
    if (state.source !== "camera") return;
    say(whyNoCamera(error));
    ui.hint.textContent = "Choose a source below, or drop a picture here.";
  }
}

function cameraFrame(video) {
  ui.hint.hidden = true;
  if (state.paused) return;
  const { shortest_side: side, longest_side: longest } = state.welcome ?? { shortest_side: LEAST_SIDE };
  const open = document.body.dataset.connection === "open" && state.prompts.size > 0 && promptValue() !== "";
  if (!open) {
    const picture = copyOf(video, Math.max(LEAST_SIDE, side), longest ?? Infinity);
    show(picture, picture, null); // nothing is looked for yet
    return;
  }
  if (state.flying.size + state.encoding >= IN_FLIGHT) {
    state.droppedHere += 1;
    return;
  }
  sendCameraFrame(copyOf(video, Math.max(LEAST_SIDE, side), longest ?? Infinity));
}

async function sendCameraFrame(picture) {
  state.encoding += 1;
  const at = performance.now();
  let bytes;
  try {
    bytes = await jpegOf(picture);
  } catch (error) {
    say(error.message);
    return;
  } finally {
    state.encoding -= 1;
  }
  if (state.source !== "camera" || state.paused) return;
  measure("compress (browser)", performance.now() - at);
  const frame = state.nextFrame++;
  if (connection.send({ type: "frame", frame }, bytes)) state.flying.set(frame, { picture, at: performance.now() });
}

async function usePicture(file) {
  if (!file) return;
  setSource("picture");
  ui.hint.hidden = true;
  state.pictureName = file.name || "picture";
  const limit = state.welcome?.max_bytes;
  if (limit && file.size > limit) {
    say(`${state.pictureName} has ${file.size} bytes; at most ${limit} are accepted; shrink the picture`);
    return;
  }
  const still = { bytes: await file.arrayBuffer(), bitmap: null, frame: 0 };
  try {
    still.bitmap = await createImageBitmap(file);
  } catch {
    still.bitmap = null; // no picture at all, or of a kind that only the server reads; it says which
  }
  if (state.source !== "picture") return;
  state.still = still;
  if (still.bitmap) show(still.bitmap, still.bitmap, null);
  sendPicture();
}

function sendPicture() {
  if (!state.still) return;
  const frame = state.nextFrame++;
  const at = performance.now();
  state.still.frame = frame;
  state.flying.clear();
  connection.send({ type: "thresholds", ...thresholdsToSend() });
  if (connection.send({ type: "frame", frame, still: true }, state.still.bytes)) {
    state.flying.set(frame, { picture: state.still.bitmap, at });
  }
}

function pause() {
  state.paused = !state.paused;
  ui.pause.setAttribute("aria-pressed", String(state.paused));
  if (state.source === "server") connection.send({ type: "source", source: state.paused ? null : "server" });
}

// ---- results ----

/** The result of a frame that this page sent. */
function found(result) {
  const flight = state.flying.get(result.frame);
  for (const frame of state.flying.keys()) if (frame <= result.frame) state.flying.delete(frame);
  if (state.source === "picture" && state.still?.frame === result.frame) {
    if (!state.still.bitmap) {
      state.still.bitmap = blank(result);
      say("the browser cannot show this kind of picture; its results are below, as JSON");
    }
    arrived(result, state.still.bitmap, flight);
  } else if (state.source === "camera" && flight) {
    arrived(result, flight.picture, flight);
  }
}

function blank({ width, height }) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}

/** The result of a frame of the server's source, and the frame. */
async function foundIn(result, jpeg) {
  const at = performance.now();
  let picture = null;
  try {
    picture = await createImageBitmap(jpeg);
  } finally {
    connection.send({ type: "ack", frame: result.frame });
  }
  if (state.source !== "server" || state.paused) {
    picture.close();
    return;
  }
  measure("decompress (browser)", performance.now() - at);
  const before = state.shown?.picture;
  arrived(result, picture, null);
  before?.close?.();
}

function arrived(result, picture, flight) {
  const now = performance.now();
  if (state.frameFailed) {
    state.frameFailed = false;
    say("");
  }
  state.frames += 1;
  state.droppedThere = result.dropped;
  state.arrivals.push(now);
  for (const [stage, milliseconds] of Object.entries(result.ms)) measure(stage, milliseconds);
  if (flight) {
    const there = Object.values(result.ms).reduce((sum, milliseconds) => sum + milliseconds, 0);
    measure("network", Math.max(0, now - flight.at - there));
  }
  note("result", {
    frame: result.frame,
    prompt: result.prompt,
    labels: [...new Set(result.detections.map(({ label }) => label))],
  });
  show(picture, result, result);
  measure("draw (browser)", performance.now() - now);
}

function measure(stage, milliseconds) {
  const before = state.stages.get(stage);
  state.stages.set(stage, before === undefined ? milliseconds : before + 0.15 * (milliseconds - before));
}

/** Puts a picture on the canvas, with what was found in it. */
function show(picture, { width, height }, result) {
  state.shown = { picture, size: { width, height }, result };
  ui.stage.dataset.frame = result?.frame ?? "";
  ui.stage.dataset.prompt = result?.prompt ?? "";
  fit();
  showShown();
  ui.snapshot.disabled = false;
  ui.copy.disabled = result === null;
}

/** The detections of the shown frame that are above the sliders, each with the color of its class. */
function above() {
  const result = state.shown?.result;
  if (!result) return [];
  const colors = state.prompts.get(result.prompt)?.colors ?? [];
  return result.detections
    .map((one, index) => ({ ...one, color: colors[result.classes[index]] ?? "#ffffff" }))
    .filter(({ label, score }) => score > thresholdOf(label));
}

function showShown() {
  if (state.shown) draw(ui.canvas, state.shown.picture, state.shown.size, above());
  showCounts();
}

/** Gives the canvas as many pixels as the screen shows of it. */
function fit() {
  const { width, height } = state.shown.size;
  const room = ui.stage.clientWidth;
  const scale = Math.min(room / width, Math.max(240, 0.75 * window.innerHeight) / height);
  const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
  const density = window.devicePixelRatio || 1;
  const pixels = [Math.max(1, Math.round(across * density)), Math.max(1, Math.round(down * density))];
  if (ui.canvas.width !== pixels[0] || ui.canvas.height !== pixels[1]) [ui.canvas.width, ui.canvas.height] = pixels;
  ui.canvas.style.width = `${across}px`;
  ui.canvas.style.height = `${down}px`;
}

function counts() {
  const of = new Map();
  for (const { label } of above()) of.set(label, (of.get(label) ?? 0) + 1);
  return of;
}

function showCounts() {
  const of = counts();
  for (const row of ui.phrases.children) {
    const text = String(of.get(row.dataset.phrase) ?? "");
    const count = row.querySelector(".count");
    if (count.textContent !== text) count.textContent = text;
  }
}

function json() {
  const { result } = state.shown;
  const source = { server: result.source, camera: "camera", picture: state.pictureName }[state.source];
  return {
    source,
    frame: result.index ?? (state.source === "picture" ? 0 : result.frame),
    width: result.width,
    height: result.height,
    prompt: state.prompts.get(result.prompt)?.prompt ?? "",
    detections: above().map(({ score, label, box, track }) => ({ score, label, box, ...(track === undefined ? {} : { track }) })),
  };
}

async function copyJson() {
  if (!state.shown?.result) return;
  const text = JSON.stringify(json());
  try {
    await navigator.clipboard.writeText(text);
    done("Copied");
  } catch {
    ui.jsonDetails.open = true;
    ui.json.textContent = JSON.stringify(json(), null, 1);
    getSelection().selectAllChildren(ui.json);
    done("The browser may not copy by itself here; the text below is selected");
  }
}

function saveSnapshot() {
  if (!state.shown) return;
  const { picture, size } = state.shown;
  const scale = Math.max(1, Math.min(3, 960 / size.width));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(size.width * scale);
  canvas.height = Math.round(size.height * scale);
  draw(canvas, picture, size, above());
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `glip-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    done("Saved");
  }, "image/png");
}

function done(text) {
  ui.done.textContent = text;
  setTimeout(() => {
    if (ui.done.textContent === text) ui.done.textContent = "";
  }, 4000);
}

// ---- numbers, twice a second; words for screen readers, every third second ----

function showNumbers() {
  const now = performance.now();
  state.arrivals = state.arrivals.filter((at) => now - at < 3000);
  const span = state.arrivals.length > 1 ? (now - state.arrivals[0]) / 1000 : 0;
  ui.fps.textContent = (span ? (state.arrivals.length - 1) / span : 0).toFixed(1);
  ui.frames.textContent = state.frames;
  ui.dropped.textContent = state.droppedHere + state.droppedThere;
  const rows = [...state.stages].map(([stage, milliseconds]) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = stage;
    const value = document.createElement("td");
    value.textContent = milliseconds.toFixed(1);
    row.append(name, value);
    return row;
  });
  ui.stages.replaceChildren(...rows);
  if (ui.jsonDetails.open && state.shown?.result && !getSelection().containsNode(ui.json, true)) {
    ui.json.textContent = JSON.stringify(json(), null, 1);
  }
}

function sayFound() {
  const words = [...counts()].map(([label, count]) => `${count} × ${label}`).join(", ");
  const text = state.shown?.result ? words || "nothing found" : "";
  if (ui.found.textContent !== text) ui.found.textContent = text;
  ui.canvas.setAttribute("aria-label", state.shown ? "Picture with boxes around what was found" : "No picture yet");
}

// ---- wiring ----

ui.prompt.oninput = () => promptChanged(false);
ui.prompt.onchange = () => promptChanged(true);
ui.prompt.onkeydown = (event) => {
  const list = document.querySelector('input[name="form"]:checked').value === "list";
  if (event.key === "Enter" && !event.shiftKey && !list && !event.isComposing) {
    event.preventDefault();
    promptChanged(true);
  }
};
for (const radio of document.querySelectorAll('input[name="form"]')) radio.onchange = () => promptChanged(true);
ui.all.oninput = allChanged;
ui.model.onchange = () => {
  state.model = ui.model.value;
  connection.send({ type: "model", model: state.model });
  ui.status.textContent = `Connected: ${state.model}`;
  sendPrompt();
};
ui.useServer.onclick = useServer;
ui.useCamera.onclick = () => useCamera();
ui.camera.onchange = () => useCamera(ui.camera.value);
ui.usePicture.onclick = () => ui.file.click();
ui.file.onchange = () => {
  usePicture(ui.file.files[0]);
  ui.file.value = ""; // the same file may be chosen again
};
ui.pause.onclick = pause;
ui.copy.onclick = copyJson;
ui.snapshot.onclick = saveSnapshot;
ui.jsonDetails.ontoggle = showNumbers;
ui.tokenForm.onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", ui.token.value);
  connection.open(ui.token.value);
};

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  ui.stage.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) ui.stage.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  ui.stage.classList.remove("over");
  usePicture(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    usePicture(event.clipboardData.files[0]);
  }
});
new ResizeObserver(() => {
  if (!state.shown) return;
  fit();
  showShown();
}).observe(ui.stage);
setInterval(showNumbers, 500);
setInterval(sayFound, 3000);

// #prompt=...&token=...: a prompt to begin with, and the token, which does not stay in the address.
const given = new URLSearchParams(location.hash.slice(1));
if (given.get("prompt")) ui.prompt.value = given.get("prompt");
if (given.get("token")) sessionStorage.setItem("token", given.get("token"));
if (location.hash) history.replaceState(null, "", location.pathname + location.search);

window.glip = { state, json, above };
connection.open(sessionStorage.getItem("token") ?? "");
