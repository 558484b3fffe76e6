"use strict";
// Where the page's data comes from: the server that served it, or the file that it is in. Both answer the same calls.

const FILE_FACTS = 30;

class ServerLog {
  async ask(path, query = {}) {
    let response;
    try {
      response = await fetch(`${path}?${new URLSearchParams(query)}`, { cache: "no-store" });
    } catch {
      throw new Error("kvledger view does not answer any more: start it again");
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
  summary() { return this.ask("summary"); }
  timeline(from, to, buckets) { return this.ask("timeline", { from, to, buckets }); }
  window(at) { return this.ask("window", { at }); }
  explain(subject, at) { return this.ask("explain", { ...subject, at }); }
  neighbour(subject, at, direction) { return this.ask("neighbour", { ...subject, at, direction }); }
  find(text) { return this.ask("find", { text }); }
  words(run, at) { return this.ask("words", { run, at }); }
}

class FileLog {
  constructor(content) {
    this.content = content;
  }
  async summary() { return this.content.summary; }
  async timeline(from, to) {
    const { first, last } = this.content.summary;
    return from >= first && to <= last ? this.content.detail : this.content.overview;
  }
  async window() { return this.content.window; }
  // What this file knows of the past: the events in it that changed the subject.
  async explain(subject, at) {
    const events = this.content.window.events.filter((event) => event.n <= at && concerns(event, subject));
    return {
      now: [],
      lines: events.slice(-FILE_FACTS).map((event) => ({ n: event.n, text: event.text })),
      omitted: events.length > FILE_FACTS ? "older events are left out" : "nothing from before this file",
    };
  }
  async find() {
    throw new Error("In a file one goes to an event by its number, or to block 17, host 3, run 5, transfer 2.");
  }
  async neighbour(subject, at, direction) {
    const events = this.content.window.events;
    const wanted = (event) => (direction > 0 ? event.n > at : event.n < at) && concerns(event, subject);
    return { n: (direction > 0 ? events.find(wanted) : events.findLast(wanted))?.n ?? null };
  }
}

// Whether an event of a window changed a block, run, request or transfer.
function concerns(event, { type, id }) {
  const field = { run: "runs", request: "requests", transfer: "transfers" }[type];
  return field ? id in (event[field] ?? {}) : event[type]?.[0].includes(id) ?? false;
}
