// The engine of C++ in WebAssembly: a file becomes a model, images become logits. One memory per model.
import { QvitError, importsOf, textAt } from "./imports.js";
import { Threads } from "./threads.js";

const VERSION = 1; // of the files that qvit.exporting.web_file writes
const LARGEST_SIDE = 2 ** 16;
const LARGEST_IMAGE = 2 ** 26; // values
const LEAST_PAGES = 64; // of a memory, as the modules are linked (modules.cmake)
const SHARED_PAGES = [2 ** 15, 2 ** 13]; // of 64 KiB: 2 GiB at most, or half a GiB
const MOST_BYTES = 2 ** 32 - 2 ** 16; // of a memory: a number beyond would be taken for a small one
const STACK = 2 ** 20;
const AT_ONCE = 64; // images that are in memory

// A module with one relaxed instruction: whether it is valid says whether the engine of JavaScript has them.
const RELAXED = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0, 65, 1, 253, 15, 65, 2, 253, 15,
  253, 128, 2, 11,
);

/** The name of the best module that this browser or Node runs. */
export function bestModule() {
  return WebAssembly.validate(RELAXED) ? "relaxed-simd" : "simd128";
}

/**
 * Memory that threads share; null where there is none: in a page that is not isolated from other origins, or where a
 * browser refuses its addresses, which it sets aside beforehand.
 */
export function sharedMemory() {
  if (globalThis.crossOriginIsolated === false) return null;
  for (const maximum of SHARED_PAGES) {
    try {
      return new WebAssembly.Memory({ initial: LEAST_PAGES, maximum, shared: true });
    } catch {
      // less may be had
    }
  }
  return null;
}

const need = (condition, reason) => {
  if (!condition) throw new QvitError(`The model cannot be read: ${reason}.`);
};

const isWhole = (value, least, most) => Number.isInteger(value) && value >= least && value <= most;

/** The description at the start of a file's bytes, and where its arrays begin. */
function readDescription(bytes) {
  need(bytes.length >= 8, "it is cut short");
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  need(length <= bytes.length - 8, "it is cut short, or no file that qvit web wrote");
  let description;
  try {
    description = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + length)));
  } catch {
    need(false, "it is damaged, or no file that qvit web wrote");
  }
  need(description?.version === VERSION, "it is of another version of qvit: run qvit web again");
  const { name, input, outputs, classes, parts, preprocessing } = description;
  need(typeof name === "string", "its name is absent");
  need(
    Array.isArray(input) && input.length === 3 && input.every((side) => isWhole(side, 1, LARGEST_SIDE)) &&
      input[0] * input[1] * input[2] <= LARGEST_IMAGE,
    "its input is no size of an image",
  );
  need(isWhole(outputs, 1, LARGEST_SIDE ** 2), "its outputs are absent");
  need(
    Array.isArray(classes) && classes.every((name) => typeof name === "string") && [0, outputs].includes(classes.length),
    "its classes are not one per output",
  );
  need(Array.isArray(parts), "its parts are absent");
  need(typeof preprocessing === "object" && preprocessing !== null, "its preprocessing is absent");
  return { description, start: 8 + length };
}

export class Engine {
  #wasm;
  #memory;
  #threads = new Threads();
  #images = null; // memory for images and outputs, of as many images as were once given
  #failure = null; // the sentence that ended the engine

  /**
   * @param {WebAssembly.Module} module compiled from a module for one thread, or with `memory` for several
   * @param {Uint8Array} bytes of a file that qvit web wrote
   * @param {WebAssembly.Memory} [memory] that threads share
   * @param {number} [threads] how many there are to be: nothing may be run before `ready`
   * @param {boolean} [slow] whether it computes without vectors, which only tests do
   */
  constructor(module, bytes, { memory, threads = 1, slow = false } = {}) {
    const { description, start } = readDescription(bytes);
    const { name, input, outputs, classes, preprocessing } = description;
    Object.assign(this, { name, input, outputs, classes, preprocessing });
    this.#memory = memory ?? new WebAssembly.Memory({ initial: LEAST_PAGES });
    const { exports } = new WebAssembly.Instance(module, importsOf(this.#memory, name));
    this.#wasm = exports;
    this.#guard(() => {
      exports._initialize();
      /** Settled when the other threads are there. */
      this.ready = this.#threads.start(this.#messages(module, threads));
      const size = bytes.length - start;
      const data = this.#allocate(size);
      this.#bytes(data, size).set(bytes.subarray(start));
      const checksum = (exports.checksum(data, size) >>> 0).toString(16).padStart(8, "0");
      need(checksum === description.checksum, "it was damaged or cut short on its way");
      exports.create(...input, threads, slow);
      const read = { data, size };
      for (const part of description.parts) this.#hand(read, "", part);
      need(exports.outputs() === outputs, "its parts give other outputs than it says");
      exports.release(data);
    });
  }

  /** End the other threads; nothing can be run after it. */
  close() {
    this.#failure ??= "The model is closed: load it again.";
    this.#threads.end();
  }

  /**
   * Logits (batch, outputs) of images (batch, channels, height, width), one after the other.
   * @param {Float32Array} images preprocessed
   * @returns {Float32Array}
   */
  run(images) {
    return this.#call(images, (data, batch, outputs) => this.#wasm.forward(data, batch, outputs));
  }

  /**
   * The codes of every quantizer in a run, for tests: of which operation, branch and part, and (batch, rows, width).
   * @param {Float32Array} images preprocessed, at most 8
   */
  codes(images) {
    const found = [];
    this.#call(images, (data, batch, outputs) => {
      const count = this.#wasm.trace(data, batch, outputs);
      const about = this.#allocate(5 * 4);
      for (let index = 0; index < count; ++index) {
        const start = this.#wasm.traced(index, about) >>> 0;
        const [operation, branch, part, rows, width] = new Uint32Array(this.#memory.buffer, about, 5);
        const values = this.#bytes(start, batch * rows * width).slice();
        found.push({ operation, branch, part: textAt(this.#memory, part), rows, width, values });
      }
      this.#wasm.release(about);
    });
    return found;
  }

  #call(images, forward) {
    const pixels = this.input[0] * this.input[1] * this.input[2];
    const batch = images.length / pixels;
    if (!(images instanceof Float32Array) || !isWhole(batch, 1, LARGEST_SIDE))
      throw new QvitError(`${this.name} takes images of ${this.input.join(" x ")} float32 values.`);
    for (const value of images)
      if (!Number.isFinite(value)) throw new QvitError("The images hold a NaN or an infinity.");
    const outputs = new Float32Array(batch * this.outputs);
    for (let image = 0; image < batch; image += AT_ONCE) {
      const part = images.subarray(image * pixels, (image + AT_ONCE) * pixels);
      this.#guard(() => outputs.set(this.#callPart(part, part.length / pixels, forward), image * this.outputs));
    }
    return outputs;
  }

  #callPart(images, batch, forward) {
    if (this.#images === null || this.#images.batch < batch) {
      if (this.#images !== null) this.#wasm.release(this.#images.data);
      this.#images = { batch, data: this.#allocate(4 * (images.length + batch * this.outputs)) };
    }
    const { data } = this.#images;
    const outputs = data + 4 * images.length;
    new Float32Array(this.#memory.buffer, data, images.length).set(images);
    forward(data, batch, outputs);
    return new Float32Array(this.#memory.buffer, outputs, batch * this.outputs);
  }

  /** What the other threads are started with, each with a stack of its own. */
  #messages(module, threads) {
    return Array.from({ length: threads - 1 }, (_, index) => ({
      module,
      memory: this.#memory,
      name: this.name,
      thread: index + 1,
      stack: this.#allocate(STACK) + STACK,
      locals: this.#allocate(this.#wasm.__tls_size.value),
    }));
  }

  /** The address of memory of the module: 32 bits, which JavaScript takes for a number with a sign. */
  #allocate(bytes) {
    if (bytes >= MOST_BYTES) throw new QvitError(`${this.name} needs more memory than there is.`);
    return this.#wasm.allocate(bytes) >>> 0;
  }

  #bytes(start, length) {
    return new Uint8Array(this.#memory.buffer, start, length);
  }

  /** Call a function that runs code of the module; whatever ends it is told in one sentence, then and ever after. */
  #guard(work) {
    if (this.#failure !== null) throw new QvitError(this.#failure);
    try {
      return work();
    } catch (error) {
      const told = error instanceof QvitError;
      this.#failure = told ? error.message : `${this.name} cannot be run: its file is damaged, or memory is short.`;
      this.#threads.end();
      throw told ? error : new QvitError(this.#failure);
    }
  }

  #text(text) {
    const bytes = new TextEncoder().encode(`${text}\0`);
    const start = this.#allocate(bytes.length);
    this.#bytes(start, bytes.length).set(bytes);
    return start;
  }

  /** Hand over a part, whatever it is: what it means the module alone knows. */
  #hand(read, name, value) {
    const wasm = this.#wasm;
    const called = this.#text(name);
    if (typeof value === "number" || typeof value === "boolean") wasm.add_number(called, Number(value));
    else if (typeof value === "string") {
      const text = this.#text(value);
      wasm.add_text(called, text);
      wasm.release(text);
    } else {
      need(typeof value === "object" && value !== null, "a part is nothing");
      if ("array" in value) this.#handArray(read, called, value);
      else {
        wasm.open_part(called);
        for (const [key, member] of Object.entries(value)) this.#hand(read, Array.isArray(value) ? "" : key, member);
        wasm.close_part();
      }
    }
    wasm.release(called);
  }

  #handArray({ data, size }, called, { array, start, shape }) {
    const width = { F32: 4, U8: 1 }[array];
    const sizes = Array.isArray(shape) && shape.length <= 4 && shape.every((side) => isWhole(side, 0, LARGEST_SIDE ** 2));
    need(width !== undefined && sizes && isWhole(start, 0, size) && start % width === 0, "an array has no place in it");
    need(start + shape.reduce((count, side) => count * side, width) <= size, "an array goes beyond its end");
    const sides = this.#allocate(4 * Math.max(1, shape.length));
    new Uint32Array(this.#memory.buffer, sides, shape.length).set(shape);
    const add = array === "F32" ? this.#wasm.add_floats : this.#wasm.add_codes;
    add(called, data + start, sides, shape.length);
    this.#wasm.release(sides);
  }
}
