// The threads of an engine beside the one that calls it: workers that share its module and its memory (thread.js).
import { QvitError, isNode } from "./imports.js";

export class Threads {
  #workers = [];
  #ended = false;

  /**
   * Start a worker per message, and return when all of them are in the module.
   * @param {object[]} messages what thread.js takes
   */
  async start(messages) {
    const { Worker } = isNode ? await import("node:worker_threads") : globalThis;
    await Promise.all(messages.map((message) => this.#start(Worker, message))).catch(() => {
      throw new QvitError("The threads of the model cannot be started: load it with { threads: 1 }.");
    });
  }

  end() {
    this.#ended = true;
    for (const worker of this.#workers) worker.terminate();
    this.#workers = [];
  }

  #start(Worker, message) {
    return new Promise((resolve, reject) => {
      if (this.#ended) return;
      const worker = new Worker(new URL("./thread.js", import.meta.url), { type: "module" });
      this.#workers.push(worker);
      const hear = (event, heard) => (isNode ? worker.once(event, heard) : worker.addEventListener(event, heard));
      hear("message", () => {
        if (isNode) worker.unref(); // a program ends without closing its models
        resolve();
      });
      hear("error", (event) => {
        event.preventDefault?.();
        reject(event);
      });
      worker.postMessage(message);
    });
  }
}
