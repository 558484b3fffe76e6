"use strict";
// The page: one place that knows what is shown (and writes it into the address), and redraws all parts from it.

const $ = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString("en");
const TABS = ["explain", "tree", "requests", "transfers"];
const FOLLOW_EVERY = 1000;

const shown = { at: 0, tab: "explain", subject: null, byOwner: false };
let log, model, summary, timeline, maps, lists, following = false;

async function start() {
  const inside = $("content");
  log = inside ? new FileLog(JSON.parse(inside.textContent)) : new ServerLog();
  summary = await log.summary();
  model = new Model(log, summary);
  timeline = new Timeline($("timeline"), log, (at) => go(at), address);
  maps = TIERS.map((tier) => new BlockMap($(tier), tier, select, (block, event) => tip(tier, block, event)));
  lists = {
    events: new List($("event-list"), eventRow, (event) => go(event.n)),
    tree: new List($("tree"), treeRow, (line) => line.id && select({ type: "run", id: line.id }, false)),
    requests: new List($("requests"), requestRow, (row) => row.id && select({ type: "request", id: row.id })),
    transfers: new List($("transfers"), transferRow, (row) => row.id && select({ type: "transfer", id: row.id })),
  };
  frame();
  controls();
  readAddress();
  await go(shown.at || summary.last);
  if (summary.live) setInterval(follow, FOLLOW_EVERY);
  document.body.dataset.ready = "yes";
}

// What does not change from event to event.
function frame() {
  document.title = `${summary.name} · kvledger`;
  $("name").textContent = summary.name;
  $("name").title = summary.name;
  timeline.bounds(...(summary.whole ?? [summary.first, summary.last]));
  const messages = [];
  if (summary.contradiction) messages.push(`The log contradicts itself, and this view ends before that: ${summary.contradiction}`);
  if (summary.damage) messages.push(`The log ends early: ${summary.damage}`);
  if (summary.exported) messages.push(summary.exported);
  $("banner").textContent = messages.join("  ");
  $("banner").hidden = !messages.length;
  $("banner").classList.toggle("note", !summary.contradiction && !summary.damage);
}

async function follow() {
  try {
    const now = await log.summary();
    const grown = now.last !== summary.last || now.first !== summary.first;
    Object.assign(summary, now);
    if (grown) {
      frame();
      timeline.fetch();
      if (following) await go(summary.last, true);
    }
    $("live").hidden = false;
    $("live").textContent = summary.live ? (following ? "● live, following" : "● live (End follows)") : "ended";
  } catch (error) {
    complain(error);
  }
}

async function go(at, keepFollowing = false) {
  at = Math.min(Math.max(at, summary.first), summary.last);
  following = at === summary.last && (keepFollowing || summary.live);
  shown.at = at;
  try {
    if (!(await model.go(at))) return;
    timeline.show(at);
    if ($("banner").dataset.error) {
      delete $("banner").dataset.error;
      frame();
    }
    draw();
    address();
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  $("banner").textContent = error.message;
  $("banner").dataset.error = "yes";
  $("banner").classList.remove("note");
  $("banner").hidden = false;
}

function draw() {
  const event = model.event;
  if (document.activeElement !== $("goto")) $("goto").value = "";
  $("goto").placeholder = `${number(model.at)} / ${number(summary.last)}`;
  $("where").textContent = new Date(event.t).toISOString().replace("T", " ").replace("Z", " UTC") + (event.s ? `   step ${number(event.s)}` : "");
  $("colour").textContent = shown.byOwner ? "coloured by owner: run, request or transfer" : "coloured by kind";
  maps.forEach((map) => map.draw(model, shown));
  drawEvent(event);
  lists.events.show([...model.window.events, ...model.window.beyond], model.at - model.window.start);
  drawSide();
}

// Events

function drawEvent(event) {
  const kind = summary.kinds[event.k];
  const title = element("p", {}, swatch(`--${familyOf(kind)}`, "dot"), " ", element("b", {}, `${number(event.n)} ${kind}`));
  const chips = element("p", { className: "chips" });
  for (const [type, label] of [["requests", "request"], ["transfers", "transfer"], ["runs", "run"]]) {
    const ids = Object.keys(event[type] ?? {}).map(Number);
    for (const id of ids.slice(0, 8)) chips.append(subjectLink({ type: label, id }), " ");
    if (ids.length > 8) chips.append(`and ${ids.length - 8} more `);
  }
  const changed = TIERS.filter((tier) => event[tier]).map((tier) => `${number(event[tier][0].length)} ${tier}`);
  if (changed.length) chips.append(`${changed.join(" and ")} blocks changed`);
  $("event").replaceChildren(title, element("p", {}, event.text), chips);
}

function eventRow(row, event, i) {
  const beyond = event.n > summary.last; // it, or one before it, contradicts the state
  row.classList.toggle("beyond", beyond);
  row.classList.toggle("wrong", beyond && event === model.window.beyond[0]);
  row.classList.toggle("current", event.n === model.at);
  row.classList.toggle("selected", Boolean(shown.subject && concerns(event, shown.subject)));
  row.classList.toggle("begins", begins(event, lists.events.items[i - 1]));
  row.title = event.text;
  row.append(element("span", { className: "number" }, number(event.n)),
    swatch(`--${familyOf(summary.kinds[event.k])}`, "dot"), element("span", { className: "text" }, event.text));
}

// From step to step: to the last event of the next one, or of the one before.
async function step(direction) {
  let at = shown.at;
  const eventAt = async (n) => {
    const window = await model.load(n);
    return window.events[n - window.start];
  };
  const beginsAt = async (n) => begins(await eventAt(n), n > summary.first ? await eventAt(n - 1) : null);
  try {
    if (direction > 0) {
      if (at < summary.last) at++;
      while (at < summary.last && !(await beginsAt(at + 1))) at++;
    } else {
      while (at > summary.first && !(await beginsAt(at))) at--;
      at--;
    }
  } catch (error) {
    complain(error);
    return;
  }
  go(at);
}

// To the event before or after this one that concerns what is selected.
async function stepSubject(direction) {
  if (!shown.subject) return;
  try {
    const { n } = await log.neighbour(shown.subject, shown.at, direction);
    if (n !== null) go(n);
  } catch (error) {
    complain(error);
  }
}

// What is selected

function select(subject, open = true) {
  shown.subject = subject;
  if (subject && open) shown.tab = "explain";
  draw();
  address();
}

function subjectName({ type, id }) {
  if (type === "request") {
    const key = model.requests.get(id)?.[0];
    return key === undefined ? `request ${id}` : `request ${id} “${key}”`;
  }
  return TIERS.includes(type) ? `${type} block ${id}` : `${type} ${id}`;
}

function subjectLink(subject) {
  const link = element("button", { className: "link" }, subjectName(subject));
  link.addEventListener("click", () => select(subject));
  return link;
}

function tip(tier, block, event) {
  $("tip").hidden = block === null;
  if (block === null) return;
  const owner = model.owner(tier, block);
  const kind = KINDS[model.blocks[tier].kinds[block]];
  $("tip").textContent = `${tier} block ${block}: ${kind}` + (owner ? `, ${subjectName(owner)}` : "");
  const left = Math.min(event.clientX + 14, innerWidth - $("tip").offsetWidth - 4);
  $("tip").style.left = `${left}px`;
  $("tip").style.top = `${event.clientY + 18}px`;
}

function drawSide() {
  for (const tab of TABS) {
    $(tab).classList.toggle("shown", tab === shown.tab);
    document.querySelector(`[data-tab=${tab}]`).setAttribute("aria-selected", tab === shown.tab);
  }
  const centre = (rows, type) => rows.findIndex((row) => shown.subject?.type === type && row.id === shown.subject.id);
  if (shown.tab === "tree") {
    const lines = treeLines(model.runs);
    lists.tree.deepest = Math.max(...[...model.runs.values()].map((run) => run[1] + run[2]), 1);
    lists.tree.show(lines, centre(lines, "run"));
  } else if (shown.tab === "requests" || shown.tab === "transfers") {
    const rows = [...model[shown.tab]].map(([id, row]) => ({ id, row }));
    rows.unshift({});
    lists[shown.tab].show(rows, centre(rows, shown.tab.slice(0, -1)));
  }
  drawExplain();
}

function treeRow(row, line) {
  if (line.root !== undefined) {
    cells(row, true, "run", `${line.root}, ${number(line.size)} runs`, [], ["blocks", "pins"]);
    row.append(swatch("--host-only"), "host only");
    return;
  }
  const { id, depth, run } = line;
  row.classList.toggle("selected", shown.subject?.type === "run" && shown.subject.id === id);
  row.classList.toggle("current", id in (model.event.runs ?? {}));
  row.title = `run ${id}: blocks ${run[1]} to ${run[1] + run[2] - 1} of its path, ${runPlace(run)}, ${run[4]} pins, depth ${depth}`;
  const bar = element("i");
  bar.style.left = `${100 * run[1] / lists.tree.deepest}%`;
  bar.style.width = `${100 * run[2] / lists.tree.deepest}%`;
  bar.style.background = `var(--${runKind(run)})`;
  row.append(element("span", { className: "number" }, String(id)),
    element("span", { className: "cell" }, `${run[2]}`), element("span", { className: "cell" }, run[4] ? `${run[4]}` : ""),
    element("span", { className: "bar" }, bar));
}

function cells(row, head, first, text, behind, before = []) {
  const cell = (value) => element("span", { className: "cell" }, value);
  row.classList.toggle("head", head);
  row.append(element("span", { className: "number" }, first), ...before.map(cell),
    element("span", { className: "text" }, text), ...behind.map(cell));
}

function requestRow(row, { id, row: request }) {
  if (!request) return cells(row, true, "id", `${model.requests.size} requests`, ["path", "table", "own", "waits"]);
  row.classList.toggle("selected", shown.subject?.type === "request" && shown.subject.id === id);
  row.classList.toggle("current", id in (model.event.requests ?? {}));
  row.title = `${request[0]}: ${request[2]} blocks of its table are cached runs, ${request[4]} are its own`;
  return cells(row, false, String(id), request[0], [request[2], request[3], request[4], request[5].join(" ")].map(String));
}

function transferRow(row, { id, row: transfer }) {
  if (!transfer) return cells(row, true, "id", `${model.transfers.size} transfers`, ["blocks", "runs", "waiters"]);
  row.classList.toggle("selected", shown.subject?.type === "transfer" && shown.subject.id === id);
  row.classList.toggle("current", id in (model.event.transfers ?? {}));
  return cells(row, false, String(id), transfer[0] + (transfer[2] ? ", quarantined" : ""),
    [transfer[1], transfer[3].length, transfer[4].length].map(String));
}

// The address: what is after # reproduces the view

function address() {
  if (!model?.window) return;
  const parts = new URLSearchParams({ at: shown.at, tab: shown.tab });
  if (shown.subject) parts.set("select", `${shown.subject.type} ${shown.subject.id}`);
  if (shown.byOwner) parts.set("colour", "owner");
  if (timeline.from > timeline.first || timeline.to < timeline.last) {
    parts.set("from", Math.round(timeline.from));
    parts.set("to", Math.round(timeline.to));
  }
  const text = `#${parts}`;
  if (text !== location.hash) history.replaceState(null, "", text);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  shown.at = Number(parts.get("at")) || summary.last;
  shown.tab = TABS.includes(parts.get("tab")) ? parts.get("tab") : "explain";
  shown.subject = parse(parts.get("select") ?? "");
  shown.byOwner = parts.get("colour") === "owner";
  const from = Number(parts.get("from")), to = Number(parts.get("to"));
  if (to > from) timeline.zoom(from, to);
  else if (summary.whole) timeline.zoom(summary.first, summary.last);
}

// "block 17", "host 3", "run 5", "transfer 2", "request 7" (its number): a subject, or null.
function parse(text) {
  const found = /^\s*(block|device|host|run|request|transfer)\s+(?:block\s+)?(\d+)\s*$/i.exec(text);
  return found && { type: found[1].toLowerCase().replace("block", "device"), id: Number(found[2]) };
}

// What is typed: an event's number, a subject, or what only the log can find: a time, a step, a request's name.
async function find(text) {
  const plain = text.replace(/[, ]/g, "");
  const subject = /^request\b/i.test(text) ? null : parse(text);
  if (/^\d+$/.test(plain)) return { n: Number(plain) };
  return subject ? { subject } : log.find(text);
}

// Controls

function controls() {
  const clicks = {
    "first": () => go(summary.first), "last": () => go(summary.last), "back": () => go(shown.at - 1),
    "forward": () => go(shown.at + 1), "back-step": () => step(-1), "forward-step": () => step(1),
    "colour": recolour, "help-button": () => $("help").showModal(),
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  for (const tab of document.querySelectorAll("[data-tab]")) tab.addEventListener("click", () => open(tab.dataset.tab));
  $("goto").addEventListener("keydown", async ({ key, target }) => {
    if (key === "Escape") {
      target.value = "";
      target.blur();
    }
    if (key !== "Enter" || !target.value.trim()) return;
    try {
      const { n, subject } = await find(target.value.trim());
      target.value = "";
      target.blur();
      if (subject) select(subject);
      else go(n);
    } catch (error) {
      complain(error);
    }
  });
  document.addEventListener("keydown", key);
  window.addEventListener("hashchange", () => {
    readAddress();
    go(shown.at);
  });
  const redraw = () => { if (model.window) { timeline.draw(); draw(); } };
  new ResizeObserver(redraw).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

function recolour() {
  shown.byOwner = !shown.byOwner;
  draw();
  address();
}

function open(tab) {
  shown.tab = tab;
  draw();
  address();
}

function key(event) {
  if (event.target === $("goto") || event.ctrlKey || event.altKey || event.metaKey || $("help").open) return;
  const by = event.shiftKey ? 1000 : 100;
  const middle = (timeline.from + timeline.to) / 2;
  const around = shown.at >= timeline.from && shown.at <= timeline.to ? shown.at : middle;
  const keys = {
    ArrowLeft: () => (event.shiftKey ? step(-1) : go(shown.at - 1)),
    ArrowRight: () => (event.shiftKey ? step(1) : go(shown.at + 1)),
    PageUp: () => go(shown.at - by), PageDown: () => go(shown.at + by),
    Home: () => go(summary.first), End: () => go(summary.last),
    ",": () => stepSubject(-1), ".": () => stepSubject(1),
    "/": () => $("goto").select(), "?": () => $("help").showModal(),
    e: () => open("explain"), t: () => open("tree"), r: () => open("requests"), x: () => open("transfers"),
    c: recolour, Escape: () => select(null),
    "+": () => timeline.scale(0.5, around), "=": () => timeline.scale(0.5, around),
    "-": () => timeline.scale(2, around), 0: () => timeline.zoom(timeline.first, timeline.last),
  };
  const action = keys[event.key] ?? keys[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
}

start().catch(complain);
