"use strict";
// The strip at the top: how full the pools are over the log, what kinds of events there are, and where we are.

const FAMILIES = {
  eviction: ["BlocksEvicted", "CacheCleared"],
  transfer: ["TransferStarted", "TransferFinished"],
  refusal: ["AllocationRefused"],
  trouble: ["QuarantineEnded", "PoolResized", "TierLost", "WorkerLost", "EpochStarted"],
};

function familyOf(kind) {
  return Object.keys(FAMILIES).find((family) => FAMILIES[family].includes(kind)) ?? "request";
}

class Timeline {
  constructor(section, log, onScrub, onZoom) {
    this.canvas = section.querySelector("canvas");
    this.readout = section.querySelector(".readout");
    this.log = log;
    this.onZoom = onZoom;
    this.data = null;
    this.at = 0;
    this.marks = [];
    this.asked = 0;
    const scrub = (event) => onScrub(Math.round(this.sequence(event.offsetX)));
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.canvas.setPointerCapture(event.pointerId);
      scrub(event);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) scrub(event);
      this.hover(event.offsetX);
    });
    this.canvas.addEventListener("pointerleave", () => this.hover(null));
    this.canvas.addEventListener("dblclick", () => this.zoom(this.first - 1, this.last + 1));
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const turn = Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.deltaY;
      if (event.shiftKey || turn === event.deltaX) this.move(turn / 600);
      else this.scale(Math.exp(turn / 400), this.sequence(event.offsetX));
    }, { passive: false });
  }

  bounds(first, last) {
    const whole = this.from === undefined || (this.from <= this.first && this.to >= this.last);
    this.first = first;
    this.last = last;
    if (whole) this.zoom(first, last);
  }

  move(share) {
    const by = (this.to - this.from) * share;
    this.zoom(this.from + by, this.to + by);
  }

  scale(factor, around) {
    this.zoom(around - (around - this.from) * factor, around + (this.to - around) * factor);
  }

  zoom(from, to) {
    const most = Math.max(this.last - this.first, 1);
    const width = Math.min(Math.max(to - from, 20), most);
    from = Math.min(Math.max(from, this.first), Math.max(this.last - width, this.first));
    this.from = from;
    this.to = from + width;
    this.draw();
    this.onZoom();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.fetch(), this.data ? 60 : 0);
  }

  // Keep the current event in sight.
  show(at) {
    this.at = at;
    const width = this.to - this.from;
    if (at < this.from || at > this.to) this.zoom(at - width / 2, at + width / 2);
    else this.draw();
  }

  async fetch() {
    const asked = ++this.asked;
    const buckets = Math.max(Math.round(this.canvas.clientWidth / 2), 100);
    const data = await this.log.timeline(Math.floor(this.from), Math.ceil(this.to), buckets);
    if (asked !== this.asked) return;
    data.families = data.last.map((_, i) => this.families(data.kinds, i));
    this.data = data;
    this.draw();
  }

  get scalePixels() { return this.canvas.clientWidth / Math.max(this.to - this.from, 1); }
  pixel(sequence) { return (sequence - this.from) * this.scalePixels; }
  sequence(pixel) { return Math.min(Math.max(this.from + pixel / this.scalePixels, this.first), this.last); }

  families(kinds, i) {
    const counts = { request: 0, eviction: 0, transfer: 0, refusal: 0, trouble: 0 };
    for (const [kind, values] of Object.entries(kinds)) counts[familyOf(kind)] += values[i];
    return counts;
  }

  draw() {
    const { context, width, height, colour } = surface(this.canvas);
    const data = this.data;
    context.fillStyle = colour("--panel");
    context.fillRect(0, 0, width, height);
    if (!data || !data.last.length) return;
    const top = 18, pools = height - 46, kinds = pools + 4, bottom = height - 16;
    const level = (share) => top + (pools - top) * (1 - share);
    context.fillStyle = colour("--free");
    context.fillRect(Math.max(this.pixel(data.start), 0), top, Math.min(this.pixel(this.last), width), pools - top);
    let begin = data.start - 1;
    const host = new Path2D(), peak = new Path2D(), troubles = [];
    for (let i = 0; i < data.last.length; i++) {
      const left = this.pixel(begin), right = this.pixel(data.last[i]);
      begin = data.last[i];
      if (right < 0 || left > width) continue;
      const x = Math.floor(left), wide = Math.max(Math.ceil(right) - x, 1);
      const used = 1 - (data.device_free[i] + data.device_evictable[i]) / data.device_blocks[i];
      const full = 1 - data.device_free[i] / data.device_blocks[i];
      context.fillStyle = colour("--evictable");
      context.fillRect(x, level(full), wide, pools - level(full));
      context.fillStyle = colour("--pinned");
      context.fillRect(x, level(used), wide, pools - level(used));
      const peaks = level(1 - data.device_room_min[i] / data.device_blocks[i]);
      peak.rect(x, peaks, wide, 1);
      if (data.host_blocks[i]) {
        const share = level(1 - data.host_free[i] / data.host_blocks[i]);
        host.lineTo(x, share);
        host.lineTo(x + wide, share);
      }
      const counts = data.families[i];
      const all = Object.values(counts).reduce((sum, count) => sum + count);
      let y = bottom;
      for (const [family, count] of Object.entries(counts)) {
        if (!count) continue;
        const tall = (bottom - kinds) * count / all;
        context.fillStyle = colour(`--${family}`);
        context.fillRect(x, y - tall, wide, tall);
        y -= tall;
      }
      if (counts.trouble || data.failed_transfers[i]) troubles.push(x + wide / 2);
    }
    context.fillStyle = colour("--pinned");
    context.fill(peak);
    context.lineWidth = 1.25;
    context.strokeStyle = colour("--transfer");
    context.stroke(host);
    context.fillStyle = colour("--trouble");
    for (const x of troubles) context.fillRect(x - 1, top - 4, 2, 4);
    context.fillStyle = colour("--accent");
    for (const mark of this.marks) context.fillRect(this.pixel(mark) - 0.5, kinds - 4, 1.5, 4);
    this.axis(context, width, height, colour);
    const x = this.pixel(this.at);
    context.fillStyle = colour("--mark");
    context.fillRect(Math.round(x), 0, 1.5, bottom);
    context.beginPath();
    context.moveTo(x - 4, 0);
    context.lineTo(x + 5.5, 0);
    context.lineTo(x + 0.75, 6);
    context.fill();
    if (this.pointer === undefined || this.pointer === null) this.read(this.at);
  }

  axis(context, width, height, colour) {
    context.fillStyle = colour("--quiet");
    context.font = getComputedStyle(document.body).font;
    context.textBaseline = "bottom";
    const times = this.data.time_ms, brief = times[times.length - 1] - times[0] < 60_000;
    const about = (this.to - this.from) / Math.max(width / 170, 1);
    const power = 10 ** Math.floor(Math.log10(about));
    const every = Math.max([1, 2, 5, 10].map((n) => n * power).find((n) => n >= about), 1);
    for (let n = Math.ceil(this.from / every) * every; n <= this.to; n += every) {
      const x = this.pixel(n);
      context.fillRect(x, height - 16, 1, 4);
      const text = `${n.toLocaleString("en")}  ${clock(this.timeOf(n), brief)}`;
      if (x + context.measureText(text).width < width) context.fillText(text, x + 3, height);
    }
  }

  bucket(sequence) {
    const last = this.data.last;
    let low = 0, high = last.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (last[middle] < sequence) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  timeOf(sequence) { return this.data.time_ms[this.bucket(sequence)]; }

  hover(pixel) {
    this.pointer = pixel;
    if (this.data?.last.length) this.read(pixel === null ? this.at : this.sequence(pixel));
  }

  read(sequence) {
    const data = this.data, i = this.bucket(sequence);
    const begin = i ? data.last[i - 1] + 1 : data.start, counts = data.families[i];
    const used = data.device_blocks[i] - data.device_free[i] - data.device_evictable[i];
    const asked = data.queried_blocks[i];
    const share = (part, all) => `${(100 * part / all).toFixed(0)} %`;
    const say = (text, colour) => element("span", {}, ...(colour ? [swatch(colour)] : []), text);
    const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
    const parts = [
      say(begin === data.last[i] ? `event ${begin.toLocaleString("en")}`
        : `events ${begin.toLocaleString("en")} – ${data.last[i].toLocaleString("en")}`),
      say(clock(data.time_ms[i], true)),
      say(`device ${share(used, data.device_blocks[i])} in use`, "--pinned"),
      say(`${share(data.device_evictable[i], data.device_blocks[i])} evictable`, "--evictable"),
    ];
    if (data.host_blocks[i]) parts.push(say(`host ${share(data.host_blocks[i] - data.host_free[i], data.host_blocks[i])} full`, "--transfer"));
    parts.push(say(`${data.requests[i]} live, ${data.transfers[i]} in flight`));
    if (asked) parts.push(say(`hits ${share(data.device_hit_blocks[i], asked)} device, ${share(data.host_hit_blocks[i], asked)} host`));
    for (const [family, count] of Object.entries(counts)) {
      if (count) parts.push(say(plural(count, `${family} event`), `--${family}`));
    }
    if (data.failed_transfers[i]) parts.push(say(plural(data.failed_transfers[i], "failed transfer"), "--trouble"));
    this.readout.replaceChildren(...parts);
  }
}

// A canvas as sharp as the screen, and its colours from the style sheet.
function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height, colour: colours() };
}

function colours() {
  const style = getComputedStyle(document.documentElement), known = {};
  return (name) => (known[name] ??= style.getPropertyValue(name).trim());
}

// Times are shown in UTC: logs travel.
function clock(milliseconds, fine = false) {
  return new Date(milliseconds).toISOString().slice(11, fine ? 23 : 19);
}
