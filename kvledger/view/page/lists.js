"use strict";
// The lists: events around the current one, the prefix tree, requests and transfers. Only the rows in sight exist.

const ROW_HEIGHT = 19;

class List {
  constructor(frame, render, onPick) {
    this.frame = frame;
    this.render = render;
    this.items = [];
    this.sheet = element("div", { className: "rows" });
    frame.append(this.sheet);
    frame.addEventListener("scroll", () => this.draw());
    this.sheet.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) onPick(this.items[row.index], event);
    });
  }

  show(items, centre = -1) {
    this.items = items;
    this.sheet.style.height = `${items.length * ROW_HEIGHT}px`;
    if (centre >= 0) {
      const height = this.frame.clientHeight, y = centre * ROW_HEIGHT;
      const margin = Math.min(4 * ROW_HEIGHT, height / 3);
      if (y < this.frame.scrollTop + margin || y > this.frame.scrollTop + height - margin - ROW_HEIGHT) {
        this.frame.scrollTop = y - height / 2;
      }
    }
    this.draw();
  }

  draw() {
    const height = this.frame.clientHeight;
    const begin = Math.max(Math.floor(this.frame.scrollTop / ROW_HEIGHT) - 2, 0);
    const end = Math.min(begin + Math.ceil(height / ROW_HEIGHT) + 4, this.items.length);
    const rows = [];
    for (let i = begin; i < end; i++) {
      const row = element("div", { className: "row", index: i });
      row.style.top = `${i * ROW_HEIGHT}px`;
      this.render(row, this.items[i], i);
      rows.push(row);
    }
    this.sheet.replaceChildren(...rows);
  }
}

// Whether an event begins a step, or, where the engine names no steps, a transaction (one moment).
function begins(event, before) {
  return !before || (event.s || before.s ? event.s !== before.s : event.t !== before.t);
}

// The tree as lines, depth first, each run with its place on its path.
function treeLines(runs) {
  const children = new Map();
  for (const [id, row] of runs) {
    if (!children.has(row[0])) children.set(row[0], []);
    children.get(row[0]).push(id);
  }
  const lines = [];
  const roots = [...children.keys()].filter((parent) => typeof parent === "string").sort();
  for (const root of roots) {
    const begin = lines.length;
    lines.push({ root });
    const stack = children.get(root).sort((a, b) => b - a).map((id) => [id, 1]);
    while (stack.length) {
      const [id, depth] = stack.pop();
      lines.push({ id, depth, run: runs.get(id) });
      for (const child of (children.get(id) ?? []).sort((a, b) => b - a)) stack.push([child, depth + 1]);
    }
    lines[begin].size = lines.length - begin - 1;
  }
  return lines;
}

// What a run's copies are: its colour in the tree.
function runKind(run) {
  const device = run[3] % 3, host = Math.floor(run[3] / 3);
  if (device === 1 || (!device && host === 1)) return "arriving";
  if (device) return run[4] ? "pinned" : "evictable";
  return "host-only";
}

function runPlace(run) {
  const copies = ["", "arriving on", "on"];
  const device = copies[run[3] % 3], host = copies[Math.floor(run[3] / 3)];
  return [device && `${device} the device`, host && `${host} the host`].filter(Boolean).join(", ");
}
