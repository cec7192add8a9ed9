// Quantized vision transformers in the browser and in Node: `const model = await load(url)`. See qvit.d.ts.
import { bestModule, sharedMemory } from "./engine.js";
import { QvitError, isNode } from "./imports.js";
import { Model } from "./model.js";

export { QvitError };

const MOST_THREADS = 64;
const USUAL_THREADS = 4; // more seldom have cores of one speed, and all wait for the slowest

/** The bytes behind a URL, or in Node also behind a path. */
async function bytesOf(source) {
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (ArrayBuffer.isView(source)) return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  const local = isNode && !(source instanceof Response) && !/^https?:/.test(String(source));
  try {
    if (local) {
      const { readFile } = await import("node:fs/promises");
      const isUrl = source instanceof URL || String(source).startsWith("file:");
      return new Uint8Array(await readFile(isUrl ? new URL(source) : String(source)));
    }
    const response = source instanceof Response ? source : await fetch(source);
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  } catch (error) {
    const name = source instanceof Response ? source.url : String(source);
    throw new QvitError(`${name} cannot be read: ${error.message.split("\n")[0].replace(/\.$/, "")}.`);
  }
}

/** What calls a model in a worker of its own. */
class Remote {
  #worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #calls = 0;

  constructor() {
    this.#worker.onmessage = ({ data: { call, result, failure } }) => {
      const { resolve, reject } = this.#waiting.get(call);
      this.#waiting.delete(call);
      failure === undefined ? resolve(result) : reject(new QvitError(failure));
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.close("The model's worker has ended: load the model again.");
    };
  }

  ask(method, values, transfer = []) {
    return new Promise((resolve, reject) => {
      if (this.#worker === null) return reject(new QvitError("The model is closed: load it again."));
      this.#waiting.set(++this.#calls, { resolve, reject });
      try {
        this.#worker.postMessage({ call: this.#calls, method, values }, transfer);
      } catch {
        this.#waiting.delete(this.#calls);
        reject(new QvitError("The image must be a file, a canvas, an image of the page, or {data, width, height}."));
      }
    });
  }

  async classify(image, options) {
    return this.#show("classify", image, options);
  }

  async embed(image) {
    return this.#show("embed", image);
  }

  async run(images) {
    return this.ask("run", [images]);
  }

  close(why = "The model was closed.") {
    this.#worker?.terminate();
    this.#worker = null;
    for (const { reject } of this.#waiting.values()) reject(new QvitError(why));
    this.#waiting.clear();
  }

  /** What belongs to the page cannot go to a worker: its pixels can. */
  async #show(method, image, ...rest) {
    const ofPage = [globalThis.HTMLImageElement, globalThis.HTMLCanvasElement, globalThis.HTMLVideoElement];
    if (!ofPage.some((kind) => kind !== undefined && image instanceof kind)) return this.ask(method, [image, ...rest]);
    const bitmap = await createImageBitmap(image, { colorSpaceConversion: "none" }).catch(() => {
      throw new QvitError("The image of the page has no pixels yet: wait until it is loaded.");
    });
    return this.ask(method, [bitmap, ...rest], [bitmap]);
  }
}

/** As many threads as there are processors, and not more than usual. */
async function usualThreads() {
  const processors = isNode
    ? (await import("node:os")).availableParallelism()
    : navigator.hardwareConcurrency;
  return Math.min(processors, USUAL_THREADS);
}

/**
 * Load a model that `qvit web` wrote.
 * @param source its URL, in Node also its path; or its bytes, or a response of fetch
 * @param {{threads?: number}} options
 */
export async function load(source, { threads } = {}) {
  threads ??= await usualThreads();
  if (!(Number.isInteger(threads) && threads >= 1 && threads <= MOST_THREADS))
    throw new QvitError(`threads must be a whole number from 1 to ${MOST_THREADS}.`);
  const memory = (threads > 1 && sharedMemory()) || undefined;
  const instructionSet = bestModule();
  const [bytes, binary] = await Promise.all([
    bytesOf(source),
    bytesOf(new URL(`./${instructionSet}${memory ? "-threads" : ""}.wasm`, import.meta.url)),
  ]);
  const module = await WebAssembly.compile(binary).catch(() => {
    throw new QvitError("WebAssembly with vectors is not there: update the browser, or Node to version 20 or later.");
  });
  const values = [module, bytes, instructionSet, memory ? threads : 1, memory];
  if (typeof Worker !== "function" || typeof document === "undefined") {
    const model = await Model.load(...values);
    return Object.assign(model, model.description);
  }
  const remote = new Remote();
  try {
    return Object.assign(remote, await remote.ask("load", values));
  } catch (error) {
    remote.close();
    throw error;
  }
}
