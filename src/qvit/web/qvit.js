// Quantized vision transformers in the browser and in Node: `const model = await load(url)`. See qvit.d.ts.
import { QvitError, bestModule } from "./engine.js";
import { Model } from "./model.js";

export { QvitError };

const isNode = typeof process === "object" && process.versions?.node !== undefined;

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

/**
 * Load a model that `qvit web` wrote.
 * @param source its URL, in Node also its path; or its bytes, or a response of fetch
 */
export async function load(source) {
  const instructionSet = bestModule();
  const [bytes, binary] = await Promise.all([
    bytesOf(source),
    bytesOf(new URL(`./${instructionSet}.wasm`, import.meta.url)),
  ]);
  const module = await WebAssembly.compile(binary).catch(() => {
    throw new QvitError("WebAssembly with vectors is not there: update the browser, or Node to version 20 or later.");
  });
  if (typeof Worker !== "function" || typeof document === "undefined") {
    const model = new Model(module, bytes, instructionSet);
    return Object.assign(model, model.description, { close() {} });
  }
  const remote = new Remote();
  try {
    return Object.assign(remote, await remote.ask("load", [module, bytes, instructionSet]));
  } catch (error) {
    remote.close();
    throw error;
  }
}
