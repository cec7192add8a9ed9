// What an instance of the engine imports, in the thread that calls it and in the others.

/** What a file or a call is refused with; its message is one sentence for people. */
export class QvitError extends Error {
  constructor(message) {
    super(message);
    this.name = "QvitError";
  }
}

export const isNode = typeof process === "object" && process.versions?.node !== undefined;

/** The text at an address, which a zero ends; beyond 2 GiB the module gives a negative one. */
export function textAt(memory, start) {
  const bytes = new Uint8Array(memory.buffer, start >>> 0);
  return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
}

/**
 * @param {WebAssembly.Memory} memory of the instance; threads of one engine share it
 * @param {string} name of the model
 */
export function importsOf(memory, name) {
  const fail = (what) => {
    const reason = textAt(memory, what);
    throw new QvitError(
      reason === "std::bad_alloc"
        ? `${name} needs more memory than there is.`
        : `The engine cannot run ${name}: ${reason}.`,
    );
  };
  const none = () => 8; // EBADF: there are no files
  const clock_time_get = (clock, precision, out) => {
    new DataView(memory.buffer).setBigUint64(out >>> 0, BigInt(Math.round(performance.now() * 1e6)), true);
    return 0;
  };
  return {
    env: { memory },
    qvit: { fail },
    wasi_snapshot_preview1: { fd_close: none, fd_seek: none, fd_write: none, clock_time_get },
  };
}
