// A thread of an engine beside the one that calls it. It enters the module, and stays in it until its worker is ended.
import { importsOf, isNode } from "./imports.js";

function enter(port, { module, memory, name, thread, stack, locals }) {
  const { exports } = new WebAssembly.Instance(module, importsOf(memory, name));
  exports.__stack_pointer.value = stack;
  exports.__wasm_init_tls(locals);
  port.postMessage(null);
  try {
    exports.serve(thread);
  } catch {
    exports.abandon();
  }
}

const listen = (port) => { port.onmessage = ({ data }) => enter(port, data); };
if (isNode) import("node:worker_threads").then(({ parentPort }) => listen(parentPort));
else listen(globalThis);
