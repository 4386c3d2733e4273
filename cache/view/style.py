"""The style sheet and the script of `cache.view`: light and dark, wide and narrow, nothing from elsewhere."""

STYLE = """
:root{--ink:#16181d;--soft:#5b6170;--line:#e3e5ea;--page:#f6f7f9;--card:#fff;--well:#eceef2;--a:#2f5fd0;
--b:#c2570c;--band:#c3cbe0;--mark:#16181d;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#eceef2;--soft:#9aa1b0;--line:#2a2e37;--page:#0f1115;
--card:#171a20;--well:#0b0d10;--a:#7da2ff;--b:#ff9d57;--band:#3b4560;--mark:#eceef2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.inner,main,footer{max-width:1280px;margin:auto;padding:0 28px}
.banner{display:flex;overflow:hidden;height:120px;background:var(--well)}
.banner img{flex:1 0 120px;min-width:0;height:120px;object-fit:fill;image-rendering:pixelated}
.eyebrow{margin:34px 0 4px;color:var(--soft);font-size:13px;letter-spacing:.08em;text-transform:uppercase}
h1{font-size:clamp(24px,4vw,40px);line-height:1.12;letter-spacing:-.022em;margin:0 0 14px;font-weight:650}
h2{font-size:22px;letter-spacing:-.012em;margin:64px 0 12px;font-weight:650}
h2 small{font-weight:400;font-size:15px;letter-spacing:0;margin-left:6px}
h3{font-size:13px;margin:0 0 2px;font-weight:400;color:var(--soft)}
.lead{font-size:18px;max-width:66ch;margin:0 0 30px;color:var(--ink)}
small,.hint,.note,.axis-name,footer{color:var(--soft);font-size:13px}
.hint{max-width:78ch;margin:0 0 18px;font-size:14px}
.boxes{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:14px;overflow:hidden}
.boxes div{background:var(--card);padding:16px 20px 14px}
.boxes strong{display:block;font-size:28px;line-height:1.2;letter-spacing:-.02em;font-weight:650}
.boxes b{display:block;font-weight:550}
.boxes small{display:block;line-height:1.35;margin-top:2px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:14px 28px;margin:26px 0 0}
dl{margin:0}dt{color:var(--soft);font-size:13px}dd{margin:0}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
.key{display:inline-block;max-width:13ch;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
vertical-align:bottom;user-select:all;cursor:copy}
.legends{display:grid;grid-template-columns:1fr 1fr;gap:10px 32px;margin:0 0 14px;max-width:1100px}
.legends p{display:flex;gap:12px;align-items:flex-start;margin:0;color:var(--soft);font-size:14px}
.legends b{color:var(--ink);font-weight:600}
.legends i{flex:none;width:46px;height:14px;border-radius:7px;margin-top:4px}
.rgb{background:linear-gradient(90deg,#e5484d,#f5a623,#46a758,#12a5c6,#3e63dd,#a144af)}
.heat{background:linear-gradient(90deg,#0d0e26,#3a1c63,#81256e,#c93e56,#f3783e,#fcde8c)}
.touch{margin:0 0 18px;padding:10px 16px;border:1px solid var(--line);border-left:3px solid var(--a);
background:var(--card);font-size:14px;border-radius:4px 10px 10px 4px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,372px),1fr));gap:18px}
.videos{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
.videos .wide{grid-column:1/-1}
article{background:var(--card);border:1px solid var(--line);border-radius:14px;overflow:hidden;
scroll-margin:16px}
article:target{border-color:var(--a);box-shadow:0 0 0 2px var(--a)}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1px}
.stage{aspect-ratio:1;display:grid;place-items:center;background:var(--well)}
.stage img,.strip img{display:block;width:100%;height:100%}
.thumb{object-fit:fill}
.map{position:relative;width:100%;height:100%}
.map img,.map canvas{image-rendering:pixelated}
.map canvas,.map svg{position:absolute;inset:0;width:100%;height:100%}
.map canvas{opacity:0}.map.on canvas{opacity:1}.map.on svg{opacity:0}
.map[data-live]{cursor:crosshair;touch-action:manipulation}
.map svg{pointer-events:none}
.map circle{fill:none;stroke:#fff;stroke-width:1.6px;vector-effect:non-scaling-stroke}
.map .under circle{stroke:#000;stroke-width:4px;opacity:.55}
.absent{display:grid;place-items:center;width:100%;height:100%;padding:14px;text-align:center;color:var(--soft);
font-size:13px}
.about{display:grid;grid-template-columns:96px 1fr;gap:16px;padding:14px 16px 16px}
.videos .about{grid-template-columns:1fr}
.stage.small{width:96px;border-radius:6px;overflow:hidden}
.said{margin:0 0 8px;unicode-bidi:isolate;font-weight:500;line-height:1.35}
.said small{display:block;font-weight:400}
article dl{font-size:13px;line-height:1.55}
article dl div{display:grid;grid-template-columns:80px 1fr;gap:8px}
.videos article dl{columns:2 220px;column-gap:28px}
.videos article dl div{break-inside:avoid}
.source{display:block;unicode-bidi:isolate}
.strip{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:repeat(var(--n),1fr);gap:1px}
.below{display:grid;grid-template-columns:minmax(0,56px) 1fr;gap:8px;align-items:center;padding:8px 8px 0;
font-size:13px;line-height:1.3}
.below small{display:block;font-size:12px}
a{color:inherit;text-decoration-color:var(--a);text-underline-offset:2px}
.pairs{list-style:none;margin:0;padding:0;display:grid;
grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.pairs li{display:grid;grid-template-columns:1fr 1fr;gap:2px;text-align:center;
background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.pairs img{display:block;width:100%;aspect-ratio:1;}.pairs .pixels{image-rendering:pixelated}
.pairs span{grid-column:1/-1;font-size:13px;padding:3px 0 5px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:16px 20px 14px;min-width:0}
figure.wide{grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:baseline;font-size:13px;margin-bottom:8px}
figcaption b{font-size:15px;font-weight:600}
figure svg{display:block;width:100%;height:auto}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--soft);stroke-width:1;vector-effect:non-scaling-stroke}
.tick,.label{fill:var(--soft);font-size:11px}.label{fill:var(--ink)}
.area{stroke-width:1.5;stroke-linejoin:round;fill-opacity:.22}
.area.a{fill:var(--a);stroke:var(--a)}.area.b{fill:var(--b);stroke:var(--b)}.area.bare{stroke:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.a{stroke:var(--a)}
.dot.a{fill:var(--a);stroke:var(--card);stroke-width:1.5}
.mark{stroke:var(--mark);stroke-width:1;stroke-dasharray:3 3;opacity:.55}
.axis-name{margin:2px 0 0;text-align:center}.note{margin:6px 0 0}
.legend{color:var(--soft)}
.legend::before{content:"";display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;
vertical-align:-1px;background:var(--soft)}
.legend.a::before{background:var(--a)}.legend.b::before{background:var(--b)}.legend.faint::before{background:var(--band)}
.spikes{position:relative;padding:0 0 22px 52px}
.spikes svg{height:190px}
.spikes>span{position:absolute;left:0;width:44px;text-align:right;font-size:12px;color:var(--soft);
transform:translateY(-50%)}
.spikes .top{top:8px}.spikes .bottom{top:182px}.spikes .zero{margin-top:0}
.spread{stroke:var(--band);stroke-width:1;fill:none}
.spike{stroke:var(--a);stroke-width:1.2;vector-effect:non-scaling-stroke;fill:none}
.tags{position:absolute;left:52px;right:0;bottom:0;height:18px}
.tag{position:absolute;transform:translateX(-50%);font-size:12px;color:var(--ink)}
table{width:100%;border-collapse:collapse;font-size:14px}
th,td{padding:7px 12px;text-align:right;border-top:1px solid var(--line);font-weight:400;vertical-align:top}
th{overflow-wrap:normal}td:not(.text){white-space:nowrap}
th:first-child{text-align:left}thead th,thead td{border:0;color:var(--soft);font-size:13px}
.text{text-align:left}
section>.scroll,.failures>*,details .scroll{background:var(--card);border:1px solid var(--line);
border-radius:14px;overflow:auto}
.failures{display:grid;grid-template-columns:220px minmax(0,1fr);gap:18px;align-items:start}
.bar{width:42%;min-width:90px;vertical-align:middle}
.bar div{height:8px;border-radius:4px;background:var(--well);overflow:hidden}
.bar b{display:block;height:100%;background:var(--a);border-radius:4px}
details{margin-top:56px}summary{cursor:pointer;color:var(--soft);margin-bottom:12px}
.recipe td{font:13px ui-monospace,SFMono-Regular,Menlo,monospace}
td.text{min-width:80px}.failures td:nth-child(2).text{min-width:170px}
.recipe th{width:1%;white-space:nowrap}
footer{padding-top:30px;padding-bottom:60px}
@media (max-width:760px){.inner,main{padding:0 16px}footer{padding:30px 16px 40px}
.legends,.charts,.failures,.videos{grid-template-columns:minmax(0,1fr)}
.banner,.banner img{height:72px}.banner img{flex-basis:72px}.lead{font-size:16px}h2{margin-top:48px}
.boxes{grid-template-columns:1fr 1fr}.boxes div:last-child:nth-child(odd){grid-column:1/-1}
.boxes div{padding:12px 14px}.boxes strong{font-size:22px}
.strip{grid-template-columns:repeat(var(--m),1fr)}
.below{grid-template-columns:minmax(0,1fr);padding:6px 6px 0}
.tick,.label{font-size:14px}figure{padding:14px 12px 12px}
.bar{display:none}.facts{grid-template-columns:1fr 1fr;gap:12px 16px}th,td{padding:7px 8px}
.pairs{grid-template-columns:repeat(auto-fill,minmax(120px,1fr))}}
@media (max-width:400px){.about{grid-template-columns:72px 1fr;gap:12px}.stage.small{width:72px}}
"""

SCRIPT = """
(() => {
const data = document.getElementById('tokens');
document.addEventListener('click', e => {
  const key = e.target.closest('.key');
  if (key && navigator.clipboard) navigator.clipboard.writeText(key.textContent).catch(() => {});
});
if (!data) return;
const k = +data.dataset.k;
const codes = Int8Array.from(atob(data.textContent), c => c.charCodeAt(0) << 24 >> 24);
const anchors = [[13,14,38],[58,28,99],[129,37,110],[201,62,86],[243,120,62],[252,222,140]];
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
      const shade = ramp[Math.max(0, Math.min(255, Math.round(dot / 16129 * 255)))];
      const self = map.start + i === token;
      image.data.set(self ? [255, 255, 255, 255] : [...shade, 255], i * 4);
    }
    map.pen.putImageData(image, 0, 0);
    map.el.classList.add('on');
  }
};
const hide = () => maps.forEach(map => map.el.classList.remove('on'));
const tokenAt = (map, e) => {
  const box = map.el.getBoundingClientRect(), place = (v, size) =>
    Math.max(0, Math.min(map.side - 1, Math.floor(v / size * map.side)));
  const row = place(e.clientY - box.top, box.height), column = place(e.clientX - box.left, box.width);
  return map.start + row * map.side + column;
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
document.querySelectorAll('.touch').forEach(el => { el.hidden = false; });
})();
"""
