// A model in the thread it is in: pictures in, classes out.
import { Engine } from "./engine.js";
import { QvitError } from "./imports.js";
import { preprocess } from "./preprocess.js";

const isPixels = (image) =>
  Number.isInteger(image?.width) && Number.isInteger(image?.height) && image.width > 0 && image.height > 0 &&
  (image.data instanceof Uint8ClampedArray || image.data instanceof Uint8Array) &&
  image.data.length === 4 * image.width * image.height;

/** RGBA pixels of whatever holds an image. */
export async function pixelsOf(image) {
  if (isPixels(image)) return image;
  if (typeof createImageBitmap !== "function" || typeof OffscreenCanvas !== "function")
    throw new QvitError("The image must be {data, width, height} of RGBA pixels: nothing else is decoded here.");
  // Pixels as the file has them: no colour profile is applied, as Pillow applies none; the orientation is followed.
  const bitmap = await createImageBitmap(image, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
    throw new QvitError("The image cannot be read: it is damaged, or of a format that this browser does not know.");
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (context === null) throw new QvitError(`The image of ${width} x ${height} pixels is too large for this browser.`);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

export class Model {
  #engine;

  /** A model whose threads are there; `memory` is one that they share. */
  static async load(module, bytes, instructionSet, threads, memory) {
    const model = new Model();
    model.#engine = new Engine(module, bytes, { memory, threads });
    try {
      await model.#engine.ready;
    } catch (error) {
      model.close();
      throw error;
    }
    const { name, input, outputs, classes } = model.#engine;
    model.description = { name, input, outputs, classes, instructionSet, threads };
    return model;
  }

  close() {
    this.#engine.close();
  }

  async classify(image, { top = 5 } = {}) {
    const { name, classes } = this.#engine;
    if (classes.length === 0)
      throw new QvitError(`${name} is a feature extractor and has no classes: embed(image) gives its vector.`);
    const { values, milliseconds } = await this.#look(image);
    const largest = values.reduce((most, value) => Math.max(most, value), -Infinity);
    const powers = Array.from(values, (value) => Math.exp(value - largest));
    const total = powers.reduce((sum, power) => sum + power, 0);
    const best = powers.map((power, index) => ({ name: classes[index], index, probability: power / total }));
    best.sort((a, b) => b.probability - a.probability || a.index - b.index);
    return { classes: best.slice(0, top), milliseconds };
  }

  async embed(image) {
    if (this.#engine.classes.length > 0)
      throw new QvitError(`${this.#engine.name} is a classifier: export a model without its head to embed images.`);
    return (await this.#look(image)).values;
  }

  async run(images) {
    return this.#engine.run(images);
  }

  async #look(image) {
    const pixels = await pixelsOf(image);
    const start = performance.now();
    const input = preprocess(pixels, this.#engine.preprocessing);
    const prepared = performance.now();
    const values = this.#engine.run(input);
    return { values, milliseconds: { prepare: prepared - start, run: performance.now() - prepared } };
  }
}
