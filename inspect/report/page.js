"use strict";
// Above some 2,000 defects the marks are columns of numbers, drawn here; below, they are in the page as SVG.
const data = JSON.parse(document.getElementById("marks").textContent);
const shapes = data.shapes.map((d) => new Path2D(d));
// "#rrggbb" as a little-endian RGBA pixel.
const inks = data.colours.map((c) => (0xff000000 | Number("0x" + c.slice(5, 7) + c.slice(3, 5) + c.slice(1, 3))) >>> 0);
const hidden = new Set();
const tip = document.getElementById("tip");
// As number and _size in page.py write them.
const number = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits, roundingMode: "halfEven" });
const size = (value) => number(value, !data.mm || value >= 100 ? 0 : value >= 10 ? 1 : 2);

// A column as _marks_data in page.py packs it: little-endian numbers in base64.
function column(name, Type) {
  return new Type(Uint8Array.from(atob(data[name]), (c) => c.charCodeAt(0)).buffer);
}
const sizes = (name) => Float32Array.from(column(name, Uint16Array), (v) => 2 ** (v / data.logSteps) - 1);
const kind = column("kind", Uint8Array), along = column("along", Uint32Array), score = column("score", Uint8Array);
const across = Float32Array.from(column("across", Uint16Array), (v) => v / data.tenth);
const length = sizes("length"), width = sizes("width"), area = sizes("area");
const [small, large] = data.radius;
const radius = area.map((a) => Math.min(large, Math.max(small, large * Math.sqrt(a / data.largest))));
const PLAIN = 20000; // more marks than this in a view are drawn as squares without a rim: shapes would not be seen

function view(canvas) {
  const numbers = Object.entries(canvas.dataset).map(([key, value]) => [key, Number(value)]);
  return { ...Object.fromEntries(numbers), w: canvas.clientWidth, h: canvas.clientHeight };
}

// Where defect i lies in a view, in css px, or null outside; the rules are those of Plot.marks in strip_map.py.
function place({ start, span, top, across: whole, scale, w, h }, i) {
  const from = along[i] - start;
  if (from > span || from + length[i] < 0 || hidden.has(kind[i])) return null;
  const r = radius[i] * scale, lw = (length[i] / span) * w, lh = (width[i] / whole) * h;
  const x = (from / span) * w, y = ((across[i] - top) / whole) * h;
  const long = lw > Math.max(2 * r, 10) || lh > Math.max(2 * r, 0.25 * h);
  if (!long && (x + lw / 2 < 0 || x + lw / 2 >= w)) return null;
  return { x, y, lw, lh, r, long };
}

function draw(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  if (canvas.width && canvas.height) (data.n - hiddenCount() > PLAIN ? drawPlain : drawShapes)(canvas, ratio);
}

function drawShapes(canvas, ratio) {
  const pen = canvas.getContext("2d"), seen = view(canvas);
  pen.strokeStyle = "#1b1f24";
  for (let i = 0; i < data.n; i++) {
    const m = place(seen, i);
    if (m === null) continue;
    pen.fillStyle = data.colours[kind[i]];
    if (m.long) {
      const [x0, y0, x1, y1] = extent(m, seen);
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.fillRect(x0, y0, x1 - x0, y1 - y0);
    } else {
      pen.setTransform(ratio * m.r, 0, 0, ratio * m.r, ratio * (m.x + m.lw / 2), ratio * (m.y + m.lh / 2));
      pen.lineWidth = 0.8 / m.r;
      pen.fill(shapes[kind[i]]);
      pen.stroke(shapes[kind[i]]);
    }
  }
}

// Straight into the pixels: some ten times faster than the pen, which records every mark.
function drawPlain(canvas, ratio) {
  const pen = canvas.getContext("2d"), seen = view(canvas), image = pen.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < data.n; i++) {
    const m = place(seen, i);
    if (m === null) continue;
    const [x0, y0, x1, y1] = extent(m, seen).map((v) => Math.round(v * ratio));
    const bottom = Math.min(Math.max(y1, y0 + 1), image.height), right = Math.min(Math.max(x1, x0 + 1), image.width);
    for (let y = Math.max(y0, 0); y < bottom; y++) pixels.fill(inks[kind[i]], y * image.width + Math.max(x0, 0), y * image.width + right);
  }
  pen.putImageData(image, 0, 0);
}

// What a mark covers, in css px: x0, y0, x1, y1.
function extent(m, seen) {
  if (!m.long) {
    const x = m.x + m.lw / 2, y = m.y + m.lh / 2;
    return [x - m.r, y - m.r, x + m.r, y + m.r];
  }
  const from = Math.max(m.x, 0), to = Math.min(m.x + m.lw, seen.w);
  return [from, m.y - 1.2, from + Math.max(to - from, 2.4), m.y + m.lh + 1.2];
}

function hiddenCount() {
  return hidden.size ? kind.reduce((count, k) => count + hidden.has(k), 0) : 0;
}

// The topmost mark under the pointer, or -1: the last one drawn.
function hit(canvas, event) {
  const box = canvas.getBoundingClientRect(), seen = view(canvas);
  const px = event.clientX - box.left, py = event.clientY - box.top;
  for (let i = data.n - 1; i >= 0; i--) {
    const m = place(seen, i);
    if (m === null) continue;
    const near = m.long
      ? px >= m.x - 2 && px <= m.x + m.lw + 2 && py >= m.y - 3 && py <= m.y + m.lh + 3
      : Math.hypot(px - m.x - m.lw / 2, py - m.y - m.lh / 2) <= m.r + 2;
    if (near) return i;
  }
  return -1;
}

function words(i) {
  const unit = data.mm ? "mm" : "px";
  const y = data.mm ? (along[i] / 1000).toFixed(3) + " m" : number(along[i]) + " px";
  return `${data.classes[kind[i]]}\ny ${y} · x ${number(across[i])} ${unit}\n` +
    `${size(length[i])} × ${size(width[i])} ${unit} (along × across), ${size(area[i])} ${data.mm ? "mm²" : "px"}\n` +
    `score ${(score[i] / 100).toFixed(2)}`;
}

const canvases = [...document.querySelectorAll("canvas")];
for (const canvas of canvases) {
  new ResizeObserver(() => draw(canvas)).observe(canvas);
  canvas.addEventListener("pointermove", (event) => {
    const i = hit(canvas, event);
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.textContent = words(i);
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - 350) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
}

for (const button of document.querySelectorAll("button[data-kind]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "true", which = Number(button.dataset.kind);
    button.setAttribute("aria-pressed", String(!shown));
    if (shown) hidden.add(which); else hidden.delete(which);
    canvases.forEach(draw);
  });
}
