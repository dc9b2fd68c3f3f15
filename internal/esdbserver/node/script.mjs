// Talks to an EventStoreDB server with the official client for Node.js, and says
// what it did. Any answer that is not as it should be ends it with status 1.
//
//   node script.mjs esdb://127.0.0.1:2113?tls=false

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import {
  ANY, BACKWARDS, END, FORWARDS, NO_STREAM, START, STREAM_EXISTS,
  EventStoreDBClient, MaxAppendSizeExceededError, StreamDeletedError, StreamNotFoundError, WrongExpectedVersionError,
  binaryEvent, jsonEvent, streamNameFilter,
} from "@eventstore/db-client";

const url = process.argv[2];
if (!url) {
  console.error("usage: node script.mjs <esdb://host:port?tls=false>");
  process.exit(2);
}
setTimeout(() => fail(new Error("it took longer than a minute")), 60_000).unref();

function fail(error) {
  console.error("DEVIATION:", error);
  process.exit(1);
}

const client = EventStoreDBClient.connectionString(url);
const category = "node" + randomUUID().replaceAll("-", "");
const stream = `${category}-1`;
const event = (n) => jsonEvent({ id: randomUUID(), type: "counted", data: { n, text: "zwölf 🦆" }, metadata: { by: "node" } });

async function collect(read) {
  const all = [];
  for await (const resolved of read) all.push(resolved);
  return all;
}

const revisions = (all) => all.map(({ event }) => Number(event.revision));

async function rejects(promise, type, check = () => {}) {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof type, `expected ${type.name}, got ${error?.name}: ${error?.message}`);
    check(error);
    return;
  }
  assert.fail(`expected ${type.name}, but it succeeded`);
}

// take returns the first n events of a subscription.
function take(subscription, n) {
  const events = [];
  return new Promise((resolve, reject) => {
    subscription.on("error", reject);
    subscription.on("data", (resolved) => {
      events.push(resolved);
      if (events.length === n) resolve(events.slice());
    });
  });
}

async function main() {
  // Append, with what the stream is expected to be.
  const first = [event(0), event(1), event(2)];
  const written = await client.appendToStream(stream, first, { expectedRevision: NO_STREAM });
  assert.equal(written.success, true);
  assert.equal(written.nextExpectedRevision, 2n);
  assert.equal(written.position.commit, written.position.prepare);
  const raw = binaryEvent({ type: "raw", data: Buffer.from([0, 255, 1]), metadata: Buffer.from([254]) });
  const second = await client.appendToStream(stream, raw, { expectedRevision: 2n });
  assert.equal(second.nextExpectedRevision, 3n);
  assert.ok(second.position.commit > written.position.commit);
  console.log(`appended 4 events to ${stream}, the last at position ${second.position.commit}`);

  // The same again is not written again.
  for (const expectedRevision of [NO_STREAM, ANY]) {
    const again = await client.appendToStream(stream, first, { expectedRevision });
    assert.equal(again.nextExpectedRevision, 2n);
  }
  console.log("appended the first 3 again, with no_stream and any: nothing was written");

  // Wrong expectations.
  await rejects(client.appendToStream(stream, event(9), { expectedRevision: 1n }), WrongExpectedVersionError, (error) => {
    assert.equal(error.expectedVersion, 1n);
    assert.equal(error.actualVersion, 3n);
  });
  await rejects(client.appendToStream(stream, event(9), { expectedRevision: NO_STREAM }), WrongExpectedVersionError, (error) => {
    assert.equal(error.actualVersion, 3n);
  });
  await rejects(client.appendToStream(`${category}-none`, event(9), { expectedRevision: STREAM_EXISTS }), WrongExpectedVersionError);
  const soft = await client.appendToStream(stream, event(9), { expectedRevision: 7n, throwOnAppendFailure: false }).catch((e) => e);
  assert.ok(soft.success === false || soft instanceof WrongExpectedVersionError);
  await rejects(client.deleteStream(stream, { expectedRevision: 0n }), WrongExpectedVersionError, (error) => {
    assert.equal(error.actualVersion, 3n);
  });
  await rejects(
    client.appendToStream(stream, binaryEvent({ type: "large", data: Buffer.alloc(1024 * 1024 + 1) }), { expectedRevision: 3n }),
    MaxAppendSizeExceededError,
  );
  console.log("wrong expected revisions, and an append that is too large, were refused by name");

  // Read.
  const forwards = await collect(client.readStream(stream, { direction: FORWARDS, fromRevision: START }));
  assert.deepEqual(revisions(forwards), [0, 1, 2, 3]);
  for (let i = 0; i < 3; i++) {
    const got = forwards[i].event;
    assert.equal(got.id, first[i].id);
    assert.equal(got.type, "counted");
    assert.equal(got.isJson, true);
    assert.deepEqual(got.data, { n: i, text: "zwölf 🦆" });
    assert.deepEqual(got.metadata, { by: "node" });
    assert.ok(Math.abs(Date.now() - new Date(got.created).getTime()) < 10 * 60_000, `created ${got.created}`);
  }
  assert.equal(forwards[3].event.isJson, false);
  assert.deepEqual([...forwards[3].event.data], [0, 255, 1]);
  assert.deepEqual([...forwards[3].event.metadata], [254]);
  assert.deepEqual(revisions(await collect(client.readStream(stream, { direction: BACKWARDS, fromRevision: END, maxCount: 2 }))), [3, 2]);
  assert.deepEqual(revisions(await collect(client.readStream(stream, { fromRevision: 2n }))), [2, 3]);
  await rejects(collect(client.readStream(`${category}-none`)), StreamNotFoundError);
  const all = await collect(client.readAll({ direction: FORWARDS, fromPosition: written.position }));
  assert.deepEqual(all.filter(({ event }) => event?.streamId === stream).map(({ event }) => Number(event.revision)), [2, 3]);
  const system = await collect(client.readAll({ direction: FORWARDS, fromPosition: START, maxCount: 1 }));
  assert.ok(system[0].event.type.startsWith("$"), `the first event is ${system[0].event.type}`);
  console.log("read the stream forwards, backwards and from the middle, and $all");

  // Subscribe: history, then what comes.
  const caughtUp = {};
  const following = client.subscribeToStream(stream, { fromRevision: 0n });
  const reached = new Promise((resolve) => following.on("caughtUp", resolve));
  const streamEvents = take(following, 4);
  const filtered = client.subscribeToAll({
    fromPosition: START,
    filter: streamNameFilter({ prefixes: [`${category}-`], maxSearchWindow: 1, checkpointInterval: 1, checkpointReached: (_, position) => { caughtUp.checkpoint = position; } }),
  });
  const allEvents = take(filtered, 6);
  await reached;
  await client.appendToStream(stream, event(4), { expectedRevision: 3n });
  await client.appendToStream(`${category}-2`, event(5), { expectedRevision: NO_STREAM });
  const toSkip = `${category}other`;
  await client.appendToStream(toSkip, event(0), { expectedRevision: NO_STREAM });
  await client.appendToStream(stream, event(6), { expectedRevision: 4n });
  assert.deepEqual(revisions(await streamEvents).slice(0, 4), [1, 2, 3, 4]);
  const seen = await allEvents;
  assert.deepEqual(seen.map(({ event }) => `${event.streamId.slice(category.length)}:${event.revision}`), ["-1:0", "-1:1", "-1:2", "-1:3", "-1:4", "-2:0"]);
  await following.unsubscribe();
  await filtered.unsubscribe();
  assert.ok(caughtUp.checkpoint.commit > 0n);
  console.log("followed the stream from revision 0 (exclusive) and $all with a filter: history, then live; checkpoints came");

  // Metadata and deletion.
  await client.setStreamMetadata(stream, { maxCount: 2 }, { expectedRevision: NO_STREAM });
  assert.deepEqual(revisions(await collect(client.readStream(stream))), [4, 5]);
  assert.equal((await client.getStreamMetadata(stream)).metadata.maxCount, 2);
  await client.deleteStream(stream, { expectedRevision: 5n });
  await rejects(collect(client.readStream(stream)), StreamNotFoundError);
  const recreated = await client.appendToStream(stream, event(7), { expectedRevision: NO_STREAM });
  assert.equal(recreated.nextExpectedRevision, 6n);
  assert.deepEqual(revisions(await collect(client.readStream(stream))), [6]);
  await client.tombstoneStream(stream, { expectedRevision: 6n });
  await rejects(collect(client.readStream(stream)), StreamDeletedError, (error) => assert.equal(error.streamName, stream));
  await rejects(client.appendToStream(stream, event(8), { expectedRevision: ANY }), StreamDeletedError);
  console.log("metadata, a soft delete, the stream written again from revision 6, a tombstone");

  await client.dispose();
  console.log("all as it should be");
}

main().then(() => process.exit(0), fail);
