// The engine of the browser in Node, for tests: a JSON object a line in, one a line out.
import { readFileSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const web = pathToFileURL(`${process.argv[2]}/`);
const { Engine } = await import(new URL("engine.js", web));
const { fit, preprocess } = await import(new URL("preprocess.js", web));
const { load } = await import(new URL("qvit.js", web));

const module = new WebAssembly.Module(readFileSync(new URL("simd128.wasm", web)));
const floats = (path) => new Float32Array(new Uint8Array(readFileSync(path)).buffer);
const write = (path, values) => writeFileSync(path, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));

const calls = {
  /** Logits of images, and with `codes` those of every quantizer, one after the other. */
  run({ file, images, out, slow, codes }) {
    const engine = new Engine(module, new Uint8Array(readFileSync(file)), slow);
    write(out, engine.run(floats(images)));
    if (codes === undefined) return null;
    const found = engine.codes(floats(images));
    writeFileSync(codes, Buffer.concat(found.map(({ values }) => values)));
    return found.map(({ operation, branch, part, rows, width }) => [[operation, branch, part], rows, width]);
  },
  fit({ pixels, width, height, preprocessing, out }) {
    writeFileSync(out, Buffer.concat(fit({ data: readFileSync(pixels), width, height }, preprocessing)));
  },
  preprocess({ pixels, width, height, preprocessing, out }) {
    write(out, preprocess({ data: readFileSync(pixels), width, height }, preprocessing));
  },
  async classify({ file, pixels, width, height, top }) {
    const model = await load(file);
    const { classes } = await model.classify({ data: readFileSync(pixels), width, height }, { top });
    return { classes, name: model.name, outputs: model.outputs, instructionSet: model.instructionSet };
  },
  async embed({ file, pixels, width, height }) {
    const model = await load(file);
    return [...(await model.embed({ data: readFileSync(pixels), width, height }))];
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, ...values } = JSON.parse(line);
  let answer;
  try {
    answer = { result: (await calls[call](values)) ?? null };
  } catch (error) {
    answer = { error: error.message, kind: error.name };
  }
  console.log(JSON.stringify(answer));
}
