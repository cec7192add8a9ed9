// The engine of C++ in WebAssembly: a file becomes a model, images become logits. One instance of the module per model.

const VERSION = 1; // of the files that qvit.exporting.web_file writes
const LARGEST_SIDE = 2 ** 16;
const LARGEST_IMAGE = 2 ** 26; // values
const PAGE = 2 ** 16;

// A module with one relaxed instruction: whether it is valid says whether the engine of JavaScript has them.
const RELAXED = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0, 65, 1, 253, 15, 65, 2, 253, 15,
  253, 128, 2, 11,
);

/** What a file or a call is refused with; its message is one sentence for people. */
export class QvitError extends Error {
  constructor(message) {
    super(message);
    this.name = "QvitError";
  }
}

/** The name of the best module that this browser or Node runs. */
export function bestModule() {
  return WebAssembly.validate(RELAXED) ? "relaxed-simd" : "simd128";
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
  #images = null; // memory for images and outputs, of as many images as were once given
  #failure = null; // the sentence that ended the instance

  /**
   * @param {WebAssembly.Module} module compiled from simd128.wasm or relaxed-simd.wasm
   * @param {Uint8Array} bytes of a file that qvit web wrote
   * @param {boolean} slow whether it computes without vectors, which only tests do
   */
  constructor(module, bytes, slow = false) {
    const { description, start } = readDescription(bytes);
    const { name, input, outputs, classes, preprocessing } = description;
    Object.assign(this, { name, input, outputs, classes, preprocessing });
    const { exports } = new WebAssembly.Instance(module, this.#imports());
    this.#wasm = exports;
    this.#memory = exports.memory;
    this.#guard(() => {
      exports._initialize();
      const size = bytes.length - start;
      const data = exports.allocate(size);
      this.#bytes(data, size).set(bytes.subarray(start));
      const checksum = (exports.checksum(data, size) >>> 0).toString(16).padStart(8, "0");
      need(checksum === description.checksum, "it was damaged or cut short on its way");
      exports.create(...input, slow);
      const read = { data, size };
      for (const part of description.parts) this.#hand(read, "", part);
      need(exports.outputs() === outputs, "its parts give other outputs than it says");
      exports.release(data);
    });
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
      const about = this.#wasm.allocate(5 * 4);
      for (let index = 0; index < count; ++index) {
        const start = this.#wasm.traced(index, about);
        const [operation, branch, part, rows, width] = new Uint32Array(this.#memory.buffer, about, 5);
        const values = this.#bytes(start, batch * rows * width).slice();
        found.push({ operation, branch, part: this.#textAt(part), rows, width, values });
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
    return this.#guard(() => {
      if (this.#images === null || this.#images.batch < batch) {
        if (this.#images !== null) this.#wasm.release(this.#images.data);
        this.#images = { batch, data: this.#wasm.allocate(4 * batch * (pixels + this.outputs)) };
      }
      const { data } = this.#images;
      const outputs = data + 4 * batch * pixels;
      new Float32Array(this.#memory.buffer, data, images.length).set(images);
      forward(data, batch, outputs);
      return new Float32Array(this.#memory.buffer, outputs, batch * this.outputs).slice();
    });
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
      throw told ? error : new QvitError(this.#failure);
    }
  }

  #imports() {
    const fail = (what) => {
      const reason = this.#textAt(what);
      throw new QvitError(
        reason === "std::bad_alloc"
          ? `${this.name} needs more memory than there is.`
          : `The engine cannot run ${this.name}: ${reason}.`,
      );
    };
    const none = () => 8; // EBADF: there are no files
    const clock_time_get = (clock, precision, out) => {
      new DataView(this.#memory.buffer).setBigUint64(out, BigInt(Math.round(performance.now() * 1e6)), true);
      return 0;
    };
    return { qvit: { fail }, wasi_snapshot_preview1: { fd_close: none, fd_seek: none, fd_write: none, clock_time_get } };
  }

  #textAt(start) {
    const bytes = new Uint8Array(this.#memory.buffer, start);
    return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
  }

  #text(text) {
    const bytes = new TextEncoder().encode(`${text}\0`);
    const start = this.#wasm.allocate(bytes.length);
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
    const sides = this.#wasm.allocate(4 * Math.max(1, shape.length));
    new Uint32Array(this.#memory.buffer, sides, shape.length).set(shape);
    const add = array === "F32" ? this.#wasm.add_floats : this.#wasm.add_codes;
    add(called, data + start, sides, shape.length);
    this.#wasm.release(sides);
  }
}
