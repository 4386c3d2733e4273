// Click on a key: copy it. Point at a token: colour every other token by its similarity to it.
(() => {
document.addEventListener('click', e => {
  const key = e.target.closest('.key');
  if (key && navigator.clipboard) navigator.clipboard.writeText(key.textContent).catch(() => {});
});

// Unit vectors of all tokens, `k` signed bytes each, scaled by 127.
const data = document.getElementById('tokens');
if (!data) return;
const k = +data.dataset.k;
const codes = Int8Array.from(atob(data.textContent), c => c.charCodeAt(0) << 24 >> 24);
const anchors = JSON.parse(data.dataset.heat);
const ramp = Array.from({length: 256}, (_, i) => {
  const at = i / 255 * (anchors.length - 1), low = Math.min(anchors.length - 2, Math.floor(at));
  return anchors[low].map((v, c) => Math.round(v + (anchors[low + 1][c] - v) * (at - low)));
});
const maps = [...document.querySelectorAll('.map[data-at]')].map(el => {
  const side = +el.dataset.side, canvas = document.createElement('canvas');
  canvas.width = canvas.height = side;
  el.append(canvas);
  el.dataset.live = '';
  return {el, side, start: +el.dataset.at, pen: canvas.getContext('2d')};
});

let held = false;
const show = token => {
  const from = codes.subarray(token * k, token * k + k);
  for (const map of maps) {
    const image = map.pen.createImageData(map.side, map.side);
    for (let i = 0; i < map.side * map.side; i++) {
      const at = (map.start + i) * k;
      let dot = 0;
      for (let j = 0; j < k; j++) dot += from[j] * codes[at + j];
      const shade = ramp[Math.max(0, Math.min(255, Math.round(dot / (127 * 127) * 255)))];
      const self = map.start + i === token;
      image.data.set(self ? [255, 255, 255, 255] : [...shade, 255], i * 4);
    }
    map.pen.putImageData(image, 0, 0);
    map.el.classList.add('on');
  }
};
const hide = () => maps.forEach(map => map.el.classList.remove('on'));
const tokenAt = (map, e) => {
  const box = map.el.getBoundingClientRect();
  const cell = (v, size) => Math.max(0, Math.min(map.side - 1, Math.floor(v / size * map.side)));
  return map.start + cell(e.clientY - box.top, box.height) * map.side + cell(e.clientX - box.left, box.width);
};
for (const map of maps) {
  map.el.addEventListener('pointermove', e => {
    if (!held && e.pointerType === 'mouse') show(tokenAt(map, e));
  });
  map.el.addEventListener('pointerleave', () => { if (!held) hide(); });
  map.el.addEventListener('click', e => {
    held = !held;
    if (held) show(tokenAt(map, e)); else hide();
  });
}
document.addEventListener('keydown', e => { if (e.key === 'Escape') { held = false; hide(); } });
document.querySelectorAll('.compare').forEach(el => { el.hidden = false; });
})();
