// The page: a picture in, classes out. site.js, which qvit web writes, says where this device keeps a copy of the site.
import { load } from "./qvit.js";
import { CACHE } from "./site.js";

const find = (id) => document.getElementById(id);
const tell = (text) => { find("status").textContent = text; };

let model = null;
let shown = null; // the URL of the picture that is shown

/** The model's file, from the copy that this device keeps if there is one. */
async function modelFile() {
  if (!("caches" in globalThis)) return fetch("model.qvit");
  const cache = await caches.open(CACHE);
  const kept = await cache.match("model.qvit");
  if (kept !== undefined) return kept;
  const response = await fetch("model.qvit");
  if (response.ok) await cache.put("model.qvit", response.clone()).catch(() => {}); // the disk may be full
  return response;
}

function list(classes) {
  const rows = classes.map(({ name, probability }) => {
    const row = document.createElement("tr");
    const share = document.createElement("td");
    const bar = document.createElement("meter");
    bar.value = probability;
    share.append(bar, ` ${(100 * probability).toFixed(1)} %`);
    const label = document.createElement("td");
    label.textContent = name;
    row.append(label, share);
    return row;
  });
  find("classes").tBodies[0].replaceChildren(...rows);
  find("classes").hidden = false;
}

async function classify(picture) {
  if (model === null || picture === null) return;
  try {
    const { classes, milliseconds } = await model.classify(picture);
    if (shown !== null) URL.revokeObjectURL(shown);
    shown = URL.createObjectURL(picture);
    find("picture").src = shown;
    find("picture").hidden = false;
    list(classes);
    tell(`${milliseconds.run.toFixed(0)} ms, and ${milliseconds.prepare.toFixed(0)} ms to prepare the picture.`);
  } catch (error) {
    tell(error.message);
  }
}

function stopCamera() {
  const camera = find("camera");
  for (const track of camera.srcObject?.getTracks() ?? []) track.stop();
  camera.srcObject = null;
  camera.hidden = true;
  find("take").textContent = "Use the camera";
}

/** The first click shows what the camera sees, the second takes the picture. */
async function useCamera() {
  const camera = find("camera");
  if (camera.srcObject === null) {
    try {
      camera.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      return tell("There is no camera, or this page may not use it.");
    }
    find("picture").hidden = true;
    camera.hidden = false;
    await camera.play();
    find("take").textContent = "Take the picture";
    return undefined;
  }
  const canvas = document.createElement("canvas");
  canvas.width = camera.videoWidth;
  canvas.height = camera.videoHeight;
  canvas.getContext("2d").drawImage(camera, 0, 0);
  stopCamera();
  return canvas.toBlob(classify, "image/png");
}

const firstFile = (transfer) => [...transfer.files].find((file) => file.type.startsWith("image/")) ?? null;

find("file").addEventListener("change", ({ target }) => classify(target.files[0] ?? null));
find("take").addEventListener("click", useCamera);
find("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
find("drop").addEventListener("dragleave", () => find("drop").classList.remove("over"));
find("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  classify(firstFile(event.dataTransfer));
});
document.addEventListener("paste", (event) => classify(firstFile(event.clipboardData)));

try {
  const start = performance.now();
  model = await load(await modelFile());
  document.title = model.name;
  find("name").textContent = model.name;
  if (model.classes.length === 0) tell("This model is a feature extractor: it has no classes to show.");
  else {
    const threads = model.threads === 1 ? "one thread" : `${model.threads} threads`;
    tell(`Ready after ${(performance.now() - start).toFixed(0)} ms, with ${threads}.`);
    find("file").disabled = false;
    find("take").disabled = navigator.mediaDevices === undefined;
  }
  await navigator.serviceWorker?.register(`sw.js?${model.instructionSet}`);
} catch (error) {
  tell(error.message);
}
