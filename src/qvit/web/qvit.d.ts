/** RGBA pixels, row by row. An ImageData is one. */
export interface Pixels {
  data: Uint8ClampedArray | Uint8Array;
  width: number;
  height: number;
}

/** In Node pixels alone; in a browser whatever it can decode or draw. */
export type Image = Pixels | Blob | ImageBitmapSource;

export interface Prediction {
  name: string;
  /** Of the class, in the order of the model's classes. */
  index: number;
  /** From 0 to 1. */
  probability: number;
}

export interface Classification {
  /** The most probable first. */
  classes: Prediction[];
  /** To resize and normalize the decoded image, and to run the model. */
  milliseconds: { prepare: number; run: number };
}

/** What a file, an image or a call is refused with; its message is one sentence. */
export class QvitError extends Error {}

export interface Model {
  readonly name: string;
  /** Channels, height and width of what `run` takes. */
  readonly input: [number, number, number];
  /** Length of what comes out: classes, or the vector of a feature extractor. */
  readonly outputs: number;
  /** In the order of the outputs; none of a feature extractor. */
  readonly classes: string[];
  readonly instructionSet: "simd128" | "relaxed-simd";
  /** How many compute together; the results do not depend on it. */
  readonly threads: number;
  /** The `top` (5) most probable classes of an image. */
  classify(image: Image, options?: { top?: number }): Promise<Classification>;
  /** The vector of an image, of a feature extractor. */
  embed(image: Image): Promise<Float32Array>;
  /** The outputs (batch, outputs) of preprocessed images (batch, channels, height, width). */
  run(images: Float32Array): Promise<Float32Array>;
  /** End the model's threads and let go of its memory. A call that is not answered yet fails. */
  close(): void;
}

export interface Options {
  /**
   * At most this many, from 1 to 64; as many as there are processors, up to 4, if it is not given. A page that is not
   * isolated from other origins (`crossOriginIsolated`) has one, whatever is given: `model.threads` says it.
   */
  threads?: number;
}

/**
 * Load a model that `qvit web` wrote. In a page it computes in a worker; in a worker and in Node, where it is called.
 * @param source its URL, in Node also its path; or its bytes, or a response of fetch.
 * @throws {QvitError} for a file that is absent, damaged or of another version of qvit, a browser without SIMD, a number
 *   of threads that is none, and threads that cannot be started.
 */
export function load(
  source: string | URL | ArrayBuffer | Uint8Array | Response,
  options?: Options,
): Promise<Model>;
