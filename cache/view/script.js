// Point at a token: darken every other token on the page, the less similar the more.
(() => {
// Unit vectors of all tokens, `k` signed bytes each, scaled by 127.
const data = document.getElementById('tokens');
if (!data) return;
const k = +data.dataset.k;
const codes = Int8Array.from(atob(data.textContent), c => c.charCodeAt(0) << 24 >> 24);
const maps = [...document.querySelectorAll('.map[data-at]')].map(el => {
  const side = +el.dataset.side, canvas = document.createElement('canvas');
  canvas.width = canvas.height = side;
  el.append(canvas);
  return {el, side, start: +el.dataset.at, pen: canvas.getContext('2d')};
});

const show = token => {
  const from = codes.subarray(token * k, token * k + k);
  for (const map of maps) {
    const shade = map.pen.createImageData(map.side, map.side);  // black, with its opacity in each fourth byte
    for (let i = 0; i < map.side * map.side; i++) {
      const at = (map.start + i) * k;
      let dot = 0;
      for (let j = 0; j < k; j++) dot += from[j] * codes[at + j];
      shade.data[i * 4 + 3] = 255 * (1 - dot / (127 * 127));
    }
    map.pen.putImageData(shade, 0, 0);
  }
  document.body.classList.add('comparing');
};
const hide = () => document.body.classList.remove('comparing');

let held = false;
for (const map of maps) {
  const tokenAt = e => {
    const cell = (at, size) => Math.min(map.side - 1, Math.floor(Math.max(0, at) / size * map.side));
    return map.start + cell(e.offsetY, map.el.clientHeight) * map.side + cell(e.offsetX, map.el.clientWidth);
  };
  map.el.addEventListener('pointermove', e => {
    if (!held && e.pointerType === 'mouse') show(tokenAt(e));
  });
  map.el.addEventListener('pointerleave', () => { if (!held) hide(); });
  map.el.addEventListener('click', e => {
    held = !held;
    if (held) show(tokenAt(e)); else hide();
  });
}
document.addEventListener('keydown', e => { if (e.key === 'Escape') { held = false; hide(); } });
document.querySelector('.compare').hidden = false;
})();
