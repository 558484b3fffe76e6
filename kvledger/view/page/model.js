"use strict";
// The state at one event. A window brings the state before its first event and what every event changes; playing an
// event forwards notes what it replaces, and playing that plays it backwards.

const TIERS = ["device", "host"];
const KINDS = ["free", "private", "pinned", "evictable", "arriving", "held", "quarantined"];
const ROWS = ["runs", "requests", "transfers"];
const KEPT_WINDOWS = 12;
const NEAR = 48; // this close to the end of a window, the next one is fetched

class Model {
  constructor(log, summary) {
    this.log = log;
    this.summary = summary;
    this.window = null;
    this.at = 0;
    this.wanted = 0;
    this.undo = [];
    this.windows = new Map();
    this.blocks = { device: null, host: null };
  }

  // Go to an event. False: somebody wanted another one in the meantime.
  async go(n) {
    this.wanted = n;
    const window = await this.load(n);
    if (this.wanted !== n) return false;
    if (window !== this.window) this.enter(window);
    while (this.at < n) this.undo.push(this.apply(window.events[++this.at - window.start]));
    while (this.at > n) {
      this.apply(this.undo.pop());
      this.at--;
    }
    const stop = window.start + window.events.length - 1;
    const ahead = (other) => { this.load(other).catch(() => {}); };
    if (n - window.start < NEAR && window.start > this.summary.first) ahead(window.start - 1);
    if (stop - n < NEAR && stop < this.summary.last) ahead(stop + 1);
    return true;
  }

  load(n) {
    const { first, window: size, exported } = this.summary;
    const start = exported ? first : Math.max(Math.floor((n - 1) / size) * size + 1, first);
    const known = this.windows.get(start);
    if (known && n <= known.reaches) return known.promise;
    const entry = { reaches: exported ? Infinity : Math.min(start + size - 1, this.summary.last) };
    entry.promise = this.log.window(n);
    entry.promise.catch(() => { if (this.windows.get(start) === entry) this.windows.delete(start); });
    this.windows.delete(start);
    this.windows.set(start, entry);
    if (this.windows.size > KEPT_WINDOWS) this.windows.delete(this.windows.keys().next().value);
    return entry.promise;
  }

  enter(window) {
    this.window = window;
    this.at = window.start - 1;
    this.undo = [];
    const frame = window.keyframe;
    for (const tier of TIERS) {
      this.blocks[tier] = {
        kinds: bytes(frame[tier].kinds).slice(),
        owners: new Uint32Array(bytes(frame[tier].owners).buffer),
      };
    }
    for (const name of ROWS) {
      this[name] = new Map(Object.entries(frame[name]).map(([id, row]) => [Number(id), row]));
    }
  }

  // Play a change; returns the one that undoes it.
  apply(change) {
    const inverse = {};
    if (change.capacity) {
      inverse.capacity = TIERS.map((tier) => this.blocks[tier].kinds.length);
      TIERS.forEach((tier, i) => this.resize(this.blocks[tier], change.capacity[i]));
    }
    for (const tier of TIERS) {
      if (!change[tier]) continue;
      const [ids, kinds, owners] = change[tier];
      const blocks = this.blocks[tier];
      inverse[tier] = [ids, ids.map((id) => blocks.kinds[id]), ids.map((id) => blocks.owners[id])];
      ids.forEach((id, i) => {
        blocks.kinds[id] = kinds[i];
        blocks.owners[id] = owners[i];
      });
    }
    for (const name of ROWS) {
      if (!change[name]) continue;
      inverse[name] = {};
      for (const [text, row] of Object.entries(change[name])) {
        const id = Number(text);
        inverse[name][id] = this[name].get(id) ?? null;
        if (row === null) this[name].delete(id);
        else this[name].set(id, row);
      }
    }
    return inverse;
  }

  resize(blocks, size) {
    for (const name of ["kinds", "owners"]) {
      const old = blocks[name];
      blocks[name] = new old.constructor(size);
      blocks[name].set(old.subarray(0, size));
    }
  }

  // The event that led to this state.
  get event() {
    return this.window.events[this.at - this.window.start];
  }

  counts(tier) {
    const counts = new Array(KINDS.length).fill(0);
    for (const kind of this.blocks[tier].kinds) counts[kind]++;
    return counts;
  }

  // The owner of a block, as a subject, or null.
  owner(tier, block) {
    const kind = KINDS[this.blocks[tier].kinds[block]];
    const type = { private: "request", pinned: "run", evictable: "run", arriving: "run", held: "transfer",
      quarantined: "transfer" }[kind];
    return type ? { type, id: this.blocks[tier].owners[block] } : null;
  }

  // Runs from a leaf up to the root.
  path(leaf) {
    const path = [];
    for (let run = this.runs.get(leaf); run; run = this.runs.get(run[0])) {
      path.push(leaf);
      leaf = run[0];
    }
    return path;
  }

  // Whether a block belongs to a subject: a function of (tier, kind, owner), or null if nothing is singled out.
  member(subject) {
    if (subject && !TIERS.includes(subject.type) && !this[`${subject.type}s`].has(subject.id)) return null;
    if (subject?.type === "run") return (kind, owner) => kind >= 2 && kind <= 4 && owner === subject.id;
    if (subject?.type === "request") {
      const path = new Set(this.path(this.requests.get(subject.id)[1]));
      return (kind, owner) => (kind === 1 ? owner === subject.id : kind >= 2 && kind <= 4 && path.has(owner));
    }
    if (subject?.type === "transfer") {
      const runs = new Set(this.transfers.get(subject.id)[3]);
      return (kind, owner) => (kind >= 5 ? owner === subject.id : kind >= 2 && kind <= 4 && runs.has(owner));
    }
    return null;
  }
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
