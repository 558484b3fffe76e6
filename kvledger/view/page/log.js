"use strict";
// Where the page's data comes from: the server that served it, or the file that it is in. Both answer the same calls.

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
}

class FileLog {
  constructor(content) {
    this.content = content;
  }
  async summary() { return this.content.summary; }
  async timeline(from, to) {
    const { first, last } = this.content.summary;
    return from >= first - 1 && to <= last + 1 ? this.content.detail : this.content.overview;
  }
  async window() { return this.content.window; }
  // What this file knows of the past: the events in it that changed the subject.
  async explain(subject) {
    const lines = this.content.window.events.filter((event) => concerns(event, subject));
    return { lines: lines.map((event) => ({ n: event.n, text: event.text })) };
  }
}

// Whether an event of a window changed a block, run, request or transfer.
function concerns(event, { type, id }) {
  const field = { run: "runs", request: "requests", transfer: "transfers" }[type];
  return field ? id in (event[field] ?? {}) : event[type]?.[0].includes(id) ?? false;
}
