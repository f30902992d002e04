// Values of a chart under the pointer or the keyboard's cursor, and its downloads.
const SVG = "http://www.w3.org/2000/svg", charts = new WeakMap();

function chartOf(svg) {
  if (!charts.has(svg)) {
    const data = JSON.parse(svg.dataset.chart);
    data.stops = [...new Set(data.series.flatMap(series => series.x))].sort((a, b) => a - b);
    data.index = data.stops.length - 1;
    charts.set(svg, data);
  }
  return charts.get(svg);
}

function fraction([low, high, isLog], value) {
  return isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
}

function position(data, x, y) {
  const [left, right, top, bottom] = data.frame;
  return [left + (right - left) * fraction(data.x_axis, x), bottom - (bottom - top) * fraction(data.y_axis, y)];
}

function format(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(3).replace(/\.?0+e/, "e");
  return value.toLocaleString("en-US", {maximumSignificantDigits: 5});
}

// Return the point of each series that is nearest to the stop, unless it is far from it.
function pointsAt(data, stop) {
  const at = fraction(data.x_axis, stop);
  return data.series.flatMap(series => {
    let best = -1, least = 0.03;
    series.x.forEach((x, i) => {
      const distance = Math.abs(fraction(data.x_axis, x) - at);
      if (distance < least || distance === 0) [best, least] = [i, distance];
    });
    return best < 0 ? [] : [{...series, x: series.x[best], y: series.y[best]}];
  });
}

function element(name, attributes, text = "") {
  const item = document.createElementNS(SVG, name);
  for (const key in attributes) item.setAttribute(key, attributes[key]);
  item.textContent = text;
  return item;
}

function clearCursor(svg) {
  svg.querySelectorAll(".cursor").forEach(item => item.remove());
}

function showValues(svg, index) {
  const data = chartOf(svg);
  data.index = Math.max(0, Math.min(data.stops.length - 1, index));
  const stop = data.stops[data.index], points = pointsAt(data, stop);
  const [x] = position(data, stop, 1), [, , top, bottom] = data.frame;
  clearCursor(svg);
  svg.append(element("path", {class: "cursor", d: `M${x} ${top}V${bottom}`}));
  for (const point of points) {
    const [cx, cy] = position(data, point.x, point.y);
    svg.append(element("circle", {class: "cursor", cx, cy, r: 3.5, fill: point.color}));
  }
  const head = document.createElement("div");
  head.textContent = `${data.x_label} ${format(stop)}`;
  const lines = points.sort((a, b) => b.y - a.y).map(point => {
    const line = document.createElement("div"), mark = document.createElement("i"), value = document.createElement("b");
    mark.style.background = point.color;
    value.textContent = format(point.y);
    line.append(mark, `${point.name || data.y_label} `, value);
    return line;
  });
  showTip([head, ...lines], () => {
    const matrix = svg.getScreenCTM();
    return [matrix.a * x + matrix.e, matrix.d * (top + 8) + matrix.f];
  });
}

function follow(event) {
  const svg = event.target.closest?.("svg.chart");
  if (!svg) return;
  const data = chartOf(svg), matrix = svg.getScreenCTM(), [left, right] = data.frame;
  const at = ((event.clientX - matrix.e) / matrix.a - left) / (right - left);
  let best = 0;
  data.stops.forEach((stop, i) => {
    if (Math.abs(fraction(data.x_axis, stop) - at) < Math.abs(fraction(data.x_axis, data.stops[best]) - at)) best = i;
  });
  showValues(svg, best);
}

document.addEventListener("pointermove", follow);
document.addEventListener("pointerdown", follow);
document.addEventListener("pointerout", event => {
  const svg = event.target.closest?.("svg.chart");
  if (svg && !svg.contains(event.relatedTarget)) {
    clearCursor(svg);
    hideTip();
  }
});
document.addEventListener("focusin", event => {
  if (event.target.matches("svg.chart:focus-visible")) showValues(event.target, chartOf(event.target).index);
});
document.addEventListener("focusout", event => {
  if (event.target.matches("svg.chart")) clearCursor(event.target);
});
document.addEventListener("keydown", event => {
  if (!event.target.matches("svg.chart")) return;
  const data = chartOf(event.target), last = data.stops.length - 1, page = Math.max(1, Math.round(last / 10));
  const moves = {ArrowLeft: data.index - 1, ArrowRight: data.index + 1, PageUp: data.index + page,
    PageDown: data.index - page, Home: 0, End: last};
  if (!(event.key in moves)) return;
  event.preventDefault();
  showValues(event.target, moves[event.key]);
});

// The saved chart has a light background, its title and its legend, and needs no style sheet.
const SAVED_STYLE = `text { font: 11px sans-serif; fill: #4a4f55; } .title { font-size: 13px; fill: #1d1f21; }
  .grid { stroke: #e2e3e0; } .axis { stroke: #85898e; } .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
  .healthy { fill: #2f8f5b; fill-opacity: .1; } .limit { stroke: #c8443c; stroke-dasharray: 4 3; }`;

function toSvg(svg) {
  const data = chartOf(svg), copy = svg.cloneNode(true), box = svg.viewBox.baseVal, line = 16, head = 26;
  const named = data.series.filter(series => series.name);
  const height = box.height + head + line * named.length + (named.length ? 6 : 0);
  clearCursor(copy);
  for (const name of ["data-chart", "class", "tabindex"]) copy.removeAttribute(name);
  copy.setAttribute("xmlns", SVG);
  copy.setAttribute("viewBox", `0 ${-head} ${box.width} ${height}`);
  copy.setAttribute("width", 2 * box.width);
  copy.setAttribute("height", 2 * height);
  copy.prepend(element("style", {}, SAVED_STYLE),
    element("rect", {x: 0, y: -head, width: box.width, height, fill: "#ffffff"}),
    element("text", {class: "title", x: 10, y: -8}, data.y_label));
  named.forEach((series, i) => {
    const y = box.height + 6 + line * i;
    copy.append(element("circle", {cx: 60, cy: y, r: 4, fill: series.color}),
      element("text", {x: 70, y: y + 4}, series.name));
  });
  return new XMLSerializer().serializeToString(copy);
}

function toCsv(svg) {
  const data = chartOf(svg), quote = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const columns = data.series.map(series => new Map(series.x.map((x, i) => [x, series.y[i]])));
  const rows = data.stops.map(x => [x, ...columns.map(column => column.get(x) ?? "")]);
  const header = [data.x_label, ...data.series.map(series => series.name || data.y_label)];
  return [header.map(quote), ...rows].map(row => row.join(",")).join("\n") + "\n";
}

document.addEventListener("click", event => {
  const button = event.target.closest?.("[data-save]");
  if (!button) return;
  const figure = button.closest("figure"), svg = figure.querySelector("svg.chart");
  const [text, type] = button.dataset.save === "svg" ? [toSvg(svg), "image/svg+xml"] : [toCsv(svg), "text/csv"];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = `${figure.dataset.file}.${button.dataset.save}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
