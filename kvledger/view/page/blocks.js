"use strict";
// One tier's blocks as a map of cells, in the order of their ids, coloured by kind or by owner.

const LARGEST_CELL = 22;

class BlockMap {
  constructor(section, tier, onSelect, onHover) {
    this.tier = tier;
    this.section = section;
    this.title = section.querySelector("h3");
    this.frame = section.querySelector(".map");
    this.canvas = section.querySelector("canvas");
    this.cells = document.createElement("canvas");
    this.canvas.addEventListener("click", (event) => {
      const block = this.blockAt(event);
      if (block !== null) onSelect({ type: tier, id: block });
    });
    this.canvas.addEventListener("pointermove", (event) => onHover(this.blockAt(event), event));
    this.canvas.addEventListener("pointerleave", (event) => onHover(null, event));
  }

  blockAt(event) {
    if (!this.cell) return null;
    const column = Math.floor(event.offsetX / this.cell), row = Math.floor(event.offsetY / this.cell);
    const block = row * this.columns + column;
    return column < this.columns && block < this.size ? block : null;
  }

  // The largest cell with which all blocks fit; where a pixel is too much, the map scrolls.
  measure() {
    const width = this.frame.clientWidth, height = this.frame.clientHeight;
    let cell = LARGEST_CELL;
    while (cell > 1 && Math.ceil(this.size / Math.floor(width / cell)) * cell > height) cell--;
    const room = cell === 1 ? width - 16 : width;
    this.cell = cell;
    this.columns = Math.max(Math.floor(room / cell), 1);
    this.rows = Math.ceil(this.size / this.columns);
    this.canvas.style.width = `${this.columns * cell}px`;
    this.canvas.style.height = `${this.rows * cell}px`;
  }

  draw(model, { byOwner, subject }) {
    const { kinds, owners } = model.blocks[this.tier];
    this.size = kinds.length;
    this.section.hidden = !this.size;
    if (!this.size) return;
    this.describe(model.counts(this.tier), byOwner);
    this.measure();
    const { context, colour } = surface(this.canvas);
    this.paint(kinds, owners, byOwner, model.member(subject), colour);
    const { cell, columns, rows } = this;
    context.imageSmoothingEnabled = false;
    context.fillStyle = colour("--panel");
    context.fillRect(0, 0, columns * cell, rows * cell);
    context.drawImage(this.cells, 0, 0, columns * cell, rows * cell);
    if (cell >= 5) {
      for (let i = 1; i <= columns; i++) context.fillRect(i * cell - 1, 0, 1, rows * cell);
      for (let i = 1; i <= rows; i++) context.fillRect(0, i * cell - 1, columns * cell, 1);
    }
    context.strokeStyle = colour("--mark");
    const changed = model.event?.[this.tier]?.[0] ?? [];
    context.lineWidth = cell >= 5 ? 1.5 : 1;
    for (const block of changed) if (block < this.size) this.outline(context, block);
    if (subject?.type === this.tier && subject.id < this.size) {
      context.strokeStyle = colour("--trouble");
      context.lineWidth = 2.5;
      this.outline(context, subject.id, 1);
    }
  }

  outline(context, block, grow = 0) {
    const side = Math.max(this.cell - 1, 4) + 2 * grow;
    const x = (block % this.columns) * this.cell + (this.cell - 1 - side) / 2;
    const y = Math.floor(block / this.columns) * this.cell + (this.cell - 1 - side) / 2;
    context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  }

  // One pixel per block, off the screen.
  paint(kinds, owners, byOwner, member, colour) {
    this.cells.width = this.columns;
    this.cells.height = this.rows;
    const context = this.cells.getContext("2d");
    const image = context.createImageData(this.columns, this.rows);
    const pixels = new Uint32Array(image.data.buffer);
    const palette = KINDS.map((kind) => pixel(colour(`--${kind}`)));
    const free = palette[0];
    for (let i = 0; i < kinds.length; i++) {
      let value = byOwner && kinds[i] ? ownerPixel(kinds[i], owners[i]) : palette[kinds[i]];
      if (member && !member(kinds[i], owners[i])) value = faint(value, free);
      pixels[i] = value;
    }
    context.putImageData(image, 0, 0);
  }

  describe(counts, byOwner) {
    const parts = [element("b", {}, this.tier === "device" ? "Device" : "Host"), ` ${this.size.toLocaleString("en")} blocks`];
    counts.forEach((count, kind) => {
      const text = `${count.toLocaleString("en")} ${KINDS[kind]}`;
      const className = count ? "" : "none"; // every kind keeps its place: nothing moves from step to step
      parts.push(element("span", { className }, ...(byOwner ? [] : [swatch(`--${KINDS[kind]}`)]), text));
    });
    this.title.replaceChildren(...parts);
  }
}

function swatch(colour, className = "swatch") {
  const made = element("i", { className });
  made.style.background = `var(${colour})`;
  return made;
}

function pixel(colour) {
  const value = parseInt(colour.slice(1), 16);
  return (0xff000000 | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}

// An eighth of the colour, the rest as if the block were free.
function faint(value, free) {
  const mix = (shift) => (((value >>> shift) & 255) + 7 * ((free >>> shift) & 255)) >> 3;
  return (0xff000000 | (mix(16) << 16) | (mix(8) << 8) | mix(0)) >>> 0;
}

// 60 hues of two strengths: neighbours in number are far apart in colour.
function ownerPixel(kind, owner) {
  const group = kind === 1 ? 7 : kind >= 5 ? 13 : 0;
  const hash = (Math.imul(owner + group, 2654435761) >>> 0) / 2 ** 32;
  const hue = Math.floor(hash * 60) * 6, light = (owner & 1) ? 0.48 : 0.62;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - 0.55 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return (0xff000000 | (channel(4) << 16) | (channel(8) << 8) | channel(0)) >>> 0;
}

// The only way in which this page makes elements: what comes from the log becomes text, never markup.
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
