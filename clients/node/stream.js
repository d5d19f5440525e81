// Streams steps of one session, through the proto alone:
//
//     node stream.js 127.0.0.1:50051 digits-reader cam-7 5
//
// opens the session, or carries it on, sends five inputs, and prints a line of JSON for each output. Killed and started again, it goes on
// where the session stands: seq says which step an input is, and a step that is sent twice is applied once.

import { randomBytes } from "node:crypto";
import path from "node:path";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address = "127.0.0.1:50051", model = "digits-reader", sessionId = "cam-7", count = "5"] = process.argv.slice(2);

const protos = process.env.ENGRAM_PROTOS ?? path.join(path.dirname(fileURLToPath(import.meta.url)), "../../proto");
const definition = loader.loadSync("engram/v1/service.proto", { includeDirs: [protos], longs: String, oneofs: true, arrays: true });
const { EngramService } = grpc.loadPackageDefinition(definition).engram.v1;

// Columns are little-endian numbers, one for each row.
const u32 = (...values) => Buffer.from(Uint32Array.from(values).buffer);
const u64 = (...values) => Buffer.from(BigUint64Array.from(values.map(BigInt)).buffer);
const f32 = (values) => Buffer.from(Float32Array.from(values).buffer);
const readU64 = (bytes) => Array.from({ length: bytes.length / 8 }, (_, row) => Number(bytes.readBigUInt64LE(8 * row)));
const readF32 = (bytes) => Array.from({ length: bytes.length / 4 }, (_, place) => bytes.readFloatLE(4 * place));

function fail(error) {
  const open = error.metadata?.applied === "unknown" ? "; whether the step was applied is not known: its seq may be asked for again" : "";
  console.error(`${error.reason}: ${error.message}${open}`);
  process.exit(1);
}

const client = new EngramService(address, grpc.credentials.createInsecure());
const stream = client.Stream();
const last = Number(count);
let handle, width, seq, answered = 0;

function step() {
  // The input here is only an example: the number of the step in every place.
  const input = new Array(width).fill(seq + 1);
  stream.write({ steps: { handles: u32(handle), seqs: u64(seq + 1), inputs: f32(input), acknowledgedSeqs: u64(seq) } });
}

stream.on("data", (response) => {
  if (response.frame === "opened") {
    const { handles, seqs, errors, model: opened } = response.opened;
    if (errors.length) fail(errors[0].error);
    handle = handles.readUInt32LE(0);
    seq = readU64(seqs)[0];
    // A row is all inputs, one after another. Here each number of them is a float32.
    const other = [...opened.inputs, ...opened.outputs].find((tensor) => tensor.dtype !== "float32");
    if (other) fail({ reason: "UNSUPPORTED", message: `${model} has the ${other.dtype} tensor ${other.name}; this example knows float32 alone` });
    width = opened.inputs.reduce((sum, tensor) => sum + tensor.shape.reduce((product, size) => product * Number(size), 1), 0);
    step();
  } else if (response.frame === "confirm") {
    stream.write({ confirm: response.confirm }); // still here: an open that arrives late, of a client that is gone, takes nothing
  } else if (response.frame === "outputs") {
    seq = readU64(response.outputs.seqs)[0];
    console.log(JSON.stringify({ session: sessionId, seq, output: readF32(response.outputs.outputs) }));
    answered += 1;
    if (answered < last) step();
    else stream.end();
  } else if (response.frame === "errors") {
    const error = response.errors.errors[0];
    // Too late, a limit, a store that is away, a server that leaves: the same step again, after the time that it says. The same seq is
    // always safe: a step that was applied after all is answered, and not applied once more.
    if ([4, 8, 14].includes(error.code)) setTimeout(step, Number(error.retryAfterMs) || 50);
    else fail(error);
  }
});
stream.on("error", (error) => fail({ reason: grpc.status[error.code], message: error.details }));
stream.on("end", () => client.close());

// A client that names itself keeps its place when it comes again; another one takes the session over.
const clientId = randomBytes(6).readUIntLE(0, 6);
stream.write({ open: { requestId: 1, model, sessionIds: [sessionId], clientId, confirms: true } });
