// The engine of the browser in Node, for tests: a JSON object a line in, one a line out.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setImmediate } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const web = pathToFileURL(`${process.argv[2]}/`);
const { Engine, sharedMemory } = await import(new URL("engine.js", web));
const { importsOf } = await import(new URL("imports.js", web));
const { fit, preprocess } = await import(new URL("preprocess.js", web));
const { load } = await import(new URL("qvit.js", web));

const compiled = (name) => new WebAssembly.Module(readFileSync(new URL(name, web)));
const [module, threadsModule] = [compiled("simd128.wasm"), compiled("simd128-threads.wasm")];
const floats = (path) => new Float32Array(new Uint8Array(readFileSync(path)).buffer);
const write = (path, values) => writeFileSync(path, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));

/** Let memory of a module that is not shared be used from 2 GiB on; what lies before is never touched. */
function beyondTwoGiB(work) {
  const { Instance } = WebAssembly;
  WebAssembly.Instance = function (...given) {
    const { exports } = new Instance(...given);
    const _initialize = () => {
      exports._initialize();
      for (let part = 0; part < 3; ++part) exports.allocate(2 ** 30 - 2 ** 20);
    };
    return { exports: { ...exports, _initialize } };
  };
  try {
    return work();
  } finally {
    WebAssembly.Instance = Instance;
  }
}

const calls = {
  /** Logits of images, and with `codes` those of every quantizer, one after the other. */
  async run({ file, images, out, slow, threads, codes, high }) {
    const [binary, memory] = threads > 1 ? [threadsModule, sharedMemory()] : [module];
    const made = () => new Engine(binary, new Uint8Array(readFileSync(file)), { memory, threads, slow });
    const engine = high ? beyondTwoGiB(made) : made();
    await engine.ready;
    write(out, engine.run(floats(images)));
    const found = codes === undefined ? [] : engine.codes(floats(images));
    engine.close();
    if (codes === undefined) return null;
    writeFileSync(codes, Buffer.concat(found.map(({ values }) => values)));
    return found.map(({ operation, branch, part, rows, width }) => [[operation, branch, part], rows, width]);
  },
  /** A call of which another thread has failed. */
  async abandoned({ file, images }) {
    const memory = sharedMemory();
    const engine = new Engine(threadsModule, new Uint8Array(readFileSync(file)), { memory, threads: 2 });
    await engine.ready;
    new WebAssembly.Instance(threadsModule, importsOf(memory, "")).exports.abandon();
    engine.run(floats(images));
  },
  /** Threads that a model got; afterwards those of the process are as many as before. */
  async threads({ file, threads, times = 1 }) {
    const running = () => readdirSync("/proc/self/task").length;
    (await load(file, { threads: 1 })).close(); // which starts those that Node reads files with
    const before = running();
    let got;
    for (let time = 0; time < times; ++time) {
      const model = await load(file, { threads });
      got = model.threads;
      await model.run(new Float32Array(model.input.reduce((count, side) => count * side, 1)));
      model.close();
    }
    while (running() > before) await setImmediate();
    return got;
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
