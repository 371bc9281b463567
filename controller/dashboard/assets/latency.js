// The charts of the latency page. Figures come from /dashboard/latency; colours from the style sheet.

const heat = document.getElementById("heat");
const percentiles = document.getElementById("percentiles");
let figures = null;
// The cell that the keyboard is at: [bar of time, bar of duration].
let cell = null;

function colour(name) {
  const probe = document.createElement("span");
  probe.className = "probe";
  document.body.append(probe);
  probe.style.color = `var(--${name})`;
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function durationText(us) {
  if (us < 1000) return `${us.toFixed(0)} µs`;
  return us < 1e6 ? `${(us / 1000).toPrecision(3)} ms` : `${(us / 1e6).toPrecision(3)} s`;
}

function clockText(us) {
  return new Date(us / 1000).toISOString().slice(11, 19);
}

function middles(edges) {
  return edges.slice(1).map((edge, index) => (edge + edges[index]) / 2);
}

function layout(yTitle, more) {
  const muted = colour("muted");
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), tickcolor: colour("line"), zeroline: false };
  return {
    margin: { l: 62, r: 8, t: 8, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: muted },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") } },
    dragmode: false,
    showlegend: false,
    ...more,
    xaxis: { ...axis, type: "date", fixedrange: true, showgrid: false, range: range(), ...timeTicks() },
    yaxis: { ...axis, type: "log", fixedrange: true, title: { text: yTitle, standoff: 8 }, ...durationTicks(), ...more?.yaxis },
  };
}

/** Labels of time as short as the time that is shown allows. */
function timeTicks() {
  const spanS = (figures.time_edges.at(-1) - figures.time_edges[0]) / 1e6;
  const tickformat = spanS < 600 ? "%H:%M:%S" : spanS < 90000 ? "%H:%M" : "%d %b";
  return { tickformat, tickangle: 0, nticks: heat.clientWidth < 480 ? 4 : 9 };
}

function range() {
  const edges = figures.time_edges;
  return [new Date(edges[0] / 1000).toISOString(), new Date(edges.at(-1) / 1000).toISOString()];
}

/** Labels the powers of ten, and 2 and 5 between them, in the unit that reads best. */
function durationTicks() {
  const values = [];
  for (let exponent = 0; exponent <= 8; exponent += 1) {
    for (const digit of [1, 2, 5]) values.push(digit * 10 ** exponent);
  }
  return { tickmode: "array", tickvals: values, ticktext: values.map(durationText).map((text) => text.replace(/\.0+ /, " ")) };
}

async function load() {
  const answer = await fetch(heat.dataset.figures);
  if (!answer.ok) throw new Error(`The figures could not be read (${answer.status}). Load the page again.`);
  figures = await answer.json();
  await draw();
}

async function draw() {
  if (figures.count === 0) {
    say("No span of this stage in this time. Choose another stage below, or look further back.");
    return;
  }
  heat.querySelector(".loading")?.remove();
  await drawHeat();
  await drawPercentiles();
  document.dispatchEvent(new Event("drawn"));
}

function say(text) {
  const note = document.createElement("p");
  note.className = "loading";
  note.setAttribute("role", "status");
  note.textContent = text;
  if (window.Plotly) for (const chart of [heat, percentiles]) Plotly.purge(chart);
  heat.replaceChildren(note);
}

async function drawHeat() {
  // Zero on a logarithmic axis is nowhere; what took less than a microsecond stands at one.
  const edges = figures.duration_edges.map((edge) => Math.max(edge, 0.5));
  const most = Math.max(...figures.counts.flat());
  const trace = {
    type: "heatmap",
    x: figures.time_edges.map((us) => new Date(us / 1000).toISOString()),
    y: edges,
    z: figures.counts.map((row) => row.map((count) => (count === 0 ? null : Math.log1p(count)))),
    customdata: figures.counts,
    text: figures.counts.map((row, y) =>
      row.map((count, x) => cellText(x, y, count)),
    ),
    hoverinfo: "text",
    zmin: 0,
    zmax: Math.log1p(most),
    xgap: 1,
    ygap: 1,
    showscale: false,
    colorscale: [[0, colour("heat-low")], [0.5, colour("heat-middle")], [1, colour("heat-high")]],
  };
  const bounds = [Math.log10(edges[0]), Math.log10(edges.at(-1))];
  const shapes = cell ? [cellShape()] : [];
  await Plotly.react(heat, [trace], layout("took", { yaxis: { range: bounds }, shapes, height: 320 }), { displayModeBar: false, responsive: true });
  if (!heat.dataset.ready) listen();
}

function cellText(x, y, count) {
  const [from, until] = [figures.duration_edges[y], figures.duration_edges[y + 1]];
  return `${count} in ${durationText(from)} to ${durationText(until)}<br>${clockText(figures.time_edges[x])} to ${clockText(figures.time_edges[x + 1])}`;
}

function cellShape() {
  const [x, y] = cell;
  return {
    type: "rect",
    x0: new Date(figures.time_edges[x] / 1000).toISOString(),
    x1: new Date(figures.time_edges[x + 1] / 1000).toISOString(),
    y0: Math.max(figures.duration_edges[y], 0.5),
    y1: figures.duration_edges[y + 1],
    line: { color: colour("accent"), width: 2 },
  };
}

async function drawPercentiles() {
  const times = middles(figures.time_edges).map((us) => new Date(us / 1000).toISOString());
  const colours = { p50: colour("edge"), p90: colour("gateway"), p99: colour("heavy") };
  const traces = Object.entries(figures.percentiles).map(([name, values]) => ({
    type: "scatter",
    mode: "lines+markers",
    name,
    x: times,
    y: values,
    text: values.map((value) => (value === null ? "" : `${name} ${durationText(value)}`)),
    hoverinfo: "text",
    line: { color: colours[name], width: 1.8 },
    marker: { size: 4 },
    connectgaps: false,
  }));
  const legend = { orientation: "h", x: 0, y: 1.16, font: { color: colour("text") } };
  const margin = { l: 62, r: 8, t: 28, b: 36 };
  await Plotly.react(percentiles, traces, layout("percentiles", { showlegend: true, legend, margin, hovermode: "x unified", height: 230 }), { displayModeBar: false, responsive: true });
}

function listen() {
  heat.dataset.ready = "yes";
  heat.on("plotly_click", (event) => {
    const [y, x] = event.points[0].pointIndex;
    open(x, y);
  });
  heat.tabIndex = 0;
  heat.setAttribute("role", "application");
  heat.setAttribute("aria-label", "Heat map of durations over time. Arrow keys move between cells, Enter opens the requests of one.");
  heat.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && cell) return open(...cell);
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    move(...step);
  });
}

/** Moves to the next cell in a direction that has a request; to the last one at first. */
function move(dx, dy) {
  const counts = figures.counts;
  if (!cell) {
    for (let x = counts[0].length - 1; x >= 0 && !cell; x -= 1) {
      const y = counts.findIndex((row) => row[x] > 0);
      if (y >= 0) cell = [x, y];
    }
  } else {
    let [x, y] = [cell[0] + dx, cell[1] + dy];
    while (dy === 0 && x >= 0 && x < counts[0].length && !counts.some((row) => row[x] > 0)) x += dx;
    if (dy === 0 && x >= 0 && x < counts[0].length && counts[y][x] === 0) y = nearest(x, y);
    while (dx === 0 && y >= 0 && y < counts.length && counts[y][x] === 0) y += dy;
    if (x < 0 || y < 0 || x >= counts[0].length || y >= counts.length) return;
    cell = [x, y];
  }
  drawHeat();
  live(cellText(...cell, counts[cell[1]][cell[0]]).replace("<br>", ", "));
}

function nearest(x, y) {
  const rows = figures.counts.map((row, index) => index).filter((index) => figures.counts[index][x] > 0);
  return rows.reduce((best, row) => (Math.abs(row - y) < Math.abs(best - y) ? row : best));
}

function live(text) {
  let note = document.getElementById("heat-cell");
  if (!note) {
    note = document.createElement("p");
    note.id = "heat-cell";
    note.className = "muted";
    note.setAttribute("role", "status");
    heat.after(note);
  }
  note.textContent = text;
}

/** Goes to the traces of one cell. */
function open(x, y) {
  if (figures.counts[y][x] === 0) return;
  const words = new URLSearchParams({
    from_us: figures.time_edges[x],
    until_us: figures.time_edges[x + 1],
    at_least_us: Math.floor(figures.duration_edges[y]),
    below_us: Math.ceil(figures.duration_edges[y + 1]),
  });
  location.assign(`${heat.dataset.traces}&${words}`);
}

if (heat) {
  // The library comes with `defer`, before any module runs.
  load().catch((error) => say(error.message));
  document.addEventListener("refreshed", () => load().catch((error) => say(error.message)));
  document.addEventListener("themed", () => figures?.count && draw());
}
