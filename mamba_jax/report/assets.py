"""Style and script of the page, kept in it so that it works without a network."""

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2330; --faint: #5d6778; --line: #dfe3ea;
  --hit: #fff3c4; --c0: #1f6feb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #0c8599; --c5: #c2255c;
  --c6: #846200; --c7: #868e99; --c8: #5f3dc4; --c9: #343a46; }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --card: #1b2028; --text: #e5e9f0; --faint: #9aa5b6;
  --line: #323a47; --hit: #4a3f12; --c0: #6ea8fe; --c1: #ff9f5a; --c2: #69db7c; --c3: #da8cf0; --c4: #4dd0e1;
  --c5: #ff8fb1; --c6: #e0bd4b; --c7: #7d8797; --c8: #a68cff; --c9: #d5dbe5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 28px 0 10px; }
small, .faint { color: var(--faint); font-weight: normal; font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 10px; margin-top: 14px; }
.tile, .chart, details, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 10px 12px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 12px; }
.chart { margin: 0; padding: 10px 12px; position: relative; }
.chart figcaption { font-weight: 600; }
.chart svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.chart .log, body:has(#log-steps:checked) .chart .linear { display: none; }
body:has(#log-steps:checked) .chart .log { display: block; }
.grid line { stroke: var(--line); }
.grid text { fill: var(--faint); font-size: 12px; }
.cursor { stroke: var(--faint); stroke-dasharray: 3 3; }
svg g path { fill: none; stroke: var(--color); stroke-width: 1.5; stroke-linejoin: round; }
svg g circle { fill: var(--color); }
svg g.marked path { stroke-dasharray: 5 3; }
svg g path.missing { stroke: var(--c5); stroke-width: 2; stroke-dasharray: none; }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); } .c3 { --color: var(--c3); }
.c4 { --color: var(--c4); } .c5 { --color: var(--c5); } .c6 { --color: var(--c6); } .c7 { --color: var(--c7); }
.c8 { --color: var(--c8); } .c9 { --color: var(--c9); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
.legend i { display: inline-block; width: 16px; height: 0; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid var(--color); }
.legend i.marked { border-top-style: dotted; }
.legend i.block { height: 12px; border: 0; width: 12px; background: var(--color); border-radius: 2px; }
output { position: absolute; z-index: 1; pointer-events: none; padding: 4px 8px; border-radius: 6px; font-size: 13px;
  background: var(--text); color: var(--card); white-space: pre; font-variant-numeric: tabular-nums; }
output:empty { display: none; }
.bar { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin: 4px 0 8px; }
.bar i { background: var(--color); }
.card { padding: 10px 12px; margin-bottom: 10px; }
details { padding: 8px 12px; margin-bottom: 10px; }
summary { cursor: pointer; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; min-width: 500px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td { overflow-wrap: break-word; }
th { white-space: nowrap; }
tr.differs td { background: var(--hit); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 0; font-size: 13px; max-height: 420px;
  overflow: auto; }
input[type=search] { width: 100%; max-width: 360px; margin: 8px 0; padding: 5px 8px; font: inherit; color: inherit;
  background: var(--back); border: 1px solid var(--line); border-radius: 6px; }
"""

SCRIPT = """
for (const chart of document.querySelectorAll(".chart")) {
  const output = chart.querySelector("output");
  for (const svg of chart.querySelectorAll("svg")) {
    const curves = JSON.parse(svg.nextElementSibling.textContent);
    const cursor = svg.querySelector(".cursor");
    const [low, high, left, right] = ["low", "high", "left", "right"].map(name => Number(svg.dataset[name]));
    const isLog = svg.parentElement.className === "log";
    const hide = () => { cursor.setAttribute("visibility", "hidden"); output.textContent = ""; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const scale = box.width / svg.viewBox.baseVal.width;
      const part = ((event.clientX - box.left) / scale - left) / (right - left);
      if (part < 0 || part > 1) return hide();
      const wanted = isLog ? low * (high / low) ** part : low + (high - low) * part;
      const nearest = steps => {
        let a = 0, b = steps.length - 1;
        while (b - a > 1) { const middle = (a + b) >> 1; if (steps[middle] < wanted) a = middle; else b = middle; }
        return wanted - steps[a] < steps[b] - wanted ? a : b;
      };
      const lines = curves.map(curve => {
        const at = nearest(curve.x);
        return `${curve.label} ${curve.y[at]}  at step ${curve.x[at].toLocaleString("en")}`;
      });
      const x = left + part * (right - left);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
      output.textContent = lines.join("\\n");
      const place = box.left - chart.getBoundingClientRect().left + x * scale;
      output.style.left = `${Math.max(0, Math.min(place + 12, chart.clientWidth - output.offsetWidth - 4))}px`;
      output.style.top = `${Math.max(0, svg.parentElement.offsetTop - output.offsetHeight)}px`;
    });
  }
}
for (const input of document.querySelectorAll("input[type=search]")) {
  const rows = input.parentElement.querySelectorAll("tbody tr");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(" ");
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
}
"""
