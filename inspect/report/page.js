"use strict";
// Above some 2,000 defects the marks are columns of numbers, drawn here; below, they are in the page as SVG.
const data = JSON.parse(document.getElementById("marks").textContent);
const shapes = data.shapes.map((d) => new Path2D(d));
const crops = new Set(data.crops);
const tip = document.getElementById("tip");
const [small, large] = data.radius;
const number = (value) => value.toLocaleString("en-US", { maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2 });

function view(canvas) {
  const numbers = Object.entries(canvas.dataset).map(([key, value]) => [key, Number(value)]);
  return { ...Object.fromEntries(numbers), w: canvas.clientWidth, h: canvas.clientHeight };
}

// Where defect i lies in a view, in css px; the rules are those of Plot.marks in strip_map.py.
function place({ start, span, top, across, scale, w, h }, i) {
  const r = Math.min(large, Math.max(small, large * Math.sqrt(Math.max(data.area[i], 0) / data.largest))) * scale;
  const lw = (data.length[i] / span) * w, lh = (data.width[i] / across) * h;
  const x = ((data.along[i] - start) / span) * w, y = ((data.across[i] - top) / across) * h;
  const long = lw > Math.max(2 * r, 10) || lh > Math.max(2 * r, 0.25 * h);
  return { x, y, lw, lh, r, long, inside: long ? x + lw > 0 && x < w : x + lw / 2 >= 0 && x + lw / 2 < w };
}

function draw(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d"), seen = view(canvas);
  for (let i = 0; i < data.id.length; i++) {
    const m = place(seen, i);
    if (!m.inside) continue;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = data.colours[data.kind[i]];
    if (m.long) {
      const from = Math.max(m.x, 0), to = Math.min(m.x + m.lw, seen.w);
      pen.fillRect(from, m.y - 1.2, Math.max(to - from, 2.4), m.lh + 2.4);
    } else {
      pen.translate(m.x + m.lw / 2, m.y + m.lh / 2);
      pen.scale(m.r, m.r);
      pen.strokeStyle = "#1b1f24";
      pen.lineWidth = 0.8 / m.r;
      pen.fill(shapes[data.kind[i]]);
      pen.stroke(shapes[data.kind[i]]);
    }
  }
}

// The topmost mark under the pointer, or -1: the last one drawn.
function hit(canvas, event) {
  const box = canvas.getBoundingClientRect(), seen = view(canvas);
  const px = event.clientX - box.left, py = event.clientY - box.top;
  for (let i = data.id.length - 1; i >= 0; i--) {
    const m = place(seen, i);
    const near = m.long
      ? px >= m.x - 2 && px <= m.x + m.lw + 2 && py >= m.y - 3 && py <= m.y + m.lh + 3
      : Math.hypot(px - m.x - m.lw / 2, py - m.y - m.lh / 2) <= m.r + 2;
    if (m.inside && near) return i;
  }
  return -1;
}

function words(i) {
  const unit = data.mm ? "mm" : "px";
  const y = data.mm ? (data.along[i] / 1000).toFixed(3) + " m" : data.along[i] + " px";
  return `${data.classes[data.kind[i]]} #${data.id[i]}\ny ${y} · x ${number(data.across[i])} ${unit}\n` +
    `${number(data.length[i])} × ${number(data.width[i])} ${unit} (along × across), ${number(data.area[i])} ${data.mm ? "mm²" : "px"}\n` +
    `score ${data.score[i].toFixed(2)}${crops.has(i) ? "\nclick for its picture" : ""}`;
}

for (const canvas of document.querySelectorAll("canvas")) {
  new ResizeObserver(() => draw(canvas)).observe(canvas);
  canvas.addEventListener("pointermove", (event) => {
    const i = hit(canvas, event);
    tip.hidden = i < 0;
    canvas.style.cursor = crops.has(i) ? "pointer" : "default";
    if (i < 0) return;
    tip.textContent = words(i);
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - 350) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => {
    const i = hit(canvas, event);
    if (crops.has(i)) location.hash = "d" + data.id[i];
  });
}
