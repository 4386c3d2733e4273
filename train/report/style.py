"""The style sheet of `train.report`: light and dark, no fonts or files from elsewhere."""

STYLE = """
:root{--ink:#1c2024;--soft:#60646c;--line:#e4e6ea;--page:#f7f8fa;--card:#fff;--a:#2563c9;--b:#d9730d;
--right:#1a7f4b;--wrong:#c23a3a;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#eceef0;--soft:#9ba1a6;--line:#2b2f33;--page:#111314;
--card:#191c1e;--a:#6ea2ff;--b:#ffa057;--right:#4cc38a;--wrong:#ff8080}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums}
header,main{max-width:1180px;margin:auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:18px;margin:40px 0 14px}
header p{color:var(--soft);margin:0 0 24px}
.boxes{display:flex;flex-wrap:wrap;gap:14px}
.boxes div{flex:1 1 200px;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:16px 20px}
.boxes strong{display:block;font-size:34px;line-height:1.25;letter-spacing:-.02em}
small{color:var(--soft);font-size:13px}
table{width:100%;border-collapse:collapse;background:var(--card);border:1px solid var(--line);
border-radius:10px}
th,td{padding:8px 16px;text-align:right;border-top:1px solid var(--line);white-space:nowrap;font-weight:400}
th{text-align:left}
thead td,thead th{border:0;color:var(--soft);font-size:13px}
.bar{width:55%}
.bar div{position:relative;height:10px;border-radius:5px;background:var(--line)}
.bar b{position:absolute;inset:0 auto 0 0;border-radius:5px;background:var(--a)}
.bar i{position:absolute;top:-4px;bottom:-4px;width:3px;margin-left:-1px;
border-radius:2px;background:var(--b)}
.charts{display:grid;grid-template-columns:repeat(2,1fr);gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px 8px}
figure:first-child{grid-column:1/-1}
figcaption{display:flex;gap:18px;align-items:baseline;font-size:13px;margin-bottom:6px}
figcaption b{font-size:14px;font-weight:600}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--line)}
.tick{fill:var(--soft);font-size:12px}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.faint{stroke:var(--a);stroke-width:1;opacity:.25}
.line.dash{stroke-dasharray:6 5}
.dot.b{fill:var(--b)}
.key{color:var(--soft)}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:currentColor}
.key.a::before{background:var(--a)}.key.b::before{background:var(--b)}
.cards{columns:4 250px;column-gap:14px}
article{break-inside:avoid;margin-bottom:14px;overflow:hidden;
background:var(--card);border:1px solid var(--line);border-radius:10px}
.images{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:1px;background:var(--line)}
.image{position:relative;align-self:center;overflow:hidden}
.image img{width:100%;display:block}
.image i{position:absolute;width:12px;height:12px;margin:-6px;border-radius:50%;border:2px solid #fff;
box-shadow:0 0 0 1px #0006}
.image .ring{width:26px;height:26px;margin:-13px;background:none}
.image .right{background:var(--right)}.image .wrong{background:var(--wrong)}
.strip{display:grid;grid-template-columns:repeat(3,1fr);gap:1px}
.strip small{display:block;text-align:center;background:var(--card)}
.absent{aspect-ratio:1;background:var(--page);display:grid;place-content:center;color:var(--soft);font-size:13px;padding:20px;text-align:center}
dl{margin:0;border-top:1px solid var(--line);padding:6px 16px 14px}
dt{color:var(--soft);font-size:13px;margin-top:8px;overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere}
.said{font-weight:600}
.right .said{color:var(--right)}.wrong .said{color:var(--wrong)}
.note{display:block;color:var(--soft);font-size:13px}
.right .note{display:inline;margin-left:10px}
.empty,.hint,summary{color:var(--soft)}
.hint{margin:-8px 0 14px;font-size:13px}
summary{cursor:pointer;margin-top:30px}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;
overflow:auto;font-size:13px}
main{padding-bottom:60px}
@media (max-width:760px){.charts{grid-template-columns:1fr}.bar{width:25%}th,td{padding:8px}}
"""
