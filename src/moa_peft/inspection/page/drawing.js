"use strict";
// Drawing: elements from numbers. Text goes in as text, never as markup.

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "className") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((one) => one !== null));
  return node;
};
const draw = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};
const known = (value) => value !== null && value !== undefined;
const short = (value, digits = 2) => {
  if (!known(value)) return "–";
  if (Math.abs(value) >= 100) return value.toFixed(0);
  if (Math.abs(value) >= 10) return value.toFixed(1);
  return value.toFixed(digits);
};
const cellText = (value) => short(value).replace(/^(-?)0\./, "$1.");
const layerWord = (layer) => `layer ${layer}`;

function rangeOf(values, stretch, fixed) {
  const numbers = values.filter(known);
  if (!stretch && fixed) return fixed;
  const least = Math.min(...numbers), most = Math.max(...numbers);
  if (!numbers.length) return [0, 1];
  return least === most ? [least - 0.5, most + 0.5] : [least, most];
}

function shade(node, value, [least, most]) {
  node.classList.add("shade");
  node.classList.toggle("none", !known(value));
  if (!known(value)) return node;
  const part = Math.min(Math.max((value - least) / (most - least || 1), 0), 1);
  node.style.setProperty("--v", part.toFixed(3));
  node.classList.toggle("middle", part > 0.497); // where words turn over in dark mode, and in light mode
  node.classList.toggle("strong", part > 0.643);
  return node;
}

function legend(node, range, what) {
  node.replaceChildren(short(range[0], 3), make("i", { "aria-hidden": "true" }), short(range[1], 3), ` ${what}; hatched: none`);
}

// A table of shaded numbers. With `choose`, cells are buttons that the arrow keys move between.
function heat(container, { caption, rows, columns, value, range, label, chosen, choose, columnHead }) {
  const move = (r, c) => { choose(r, c); container.querySelector(`[data-place="${r},${c}"]`)?.focus(); }; // it was drawn anew
  const head = make("tr", {}, make("td"), ...columns.map((column, place) => make("th", { scope: "col" }, columnHead ? columnHead(column) : String(column))));
  const body = rows.map((row, r) => make("tr", {}, make("th", { scope: "row" }, String(row)), ...columns.map((column, c) => {
    const number = value(r, c);
    const cell = shade(make("td", { className: "cell" }), number, range);
    const words = label(r, c, number);
    if (!choose) { cell.title = words; cell.append(make("span", {}, cellText(number))); return cell; }
    const on = chosen(r, c);
    const button = make("button", { type: "button", title: words, "aria-label": words, "aria-pressed": String(on), tabindex: on ? "0" : "-1",
      onclick: () => move(r, c) }, cellText(number));
    button.dataset.place = `${r},${c}`;
    cell.append(button);
    return cell;
  })));
  const tall = columns.some((column) => String(column).length > 11);
  const table = make("table", { className: tall ? "tall" : "" }, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  if (choose) {
    if (!table.querySelector('button[tabindex="0"]')) table.querySelector("button")?.setAttribute("tabindex", "0");
    table.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const at = event.target.dataset?.place?.split(",").map(Number);
      if (!step || !at) return;
      event.preventDefault();
      const r = at[0] + step[0], c = at[1] + step[1];
      if (!table.querySelector(`[data-place="${r},${c}"]`)) return;
      move(r, c);
    });
  }
  container.replaceChildren(table);
}

function bars(container, title, names, values, chosen, words) {
  const most = Math.max(...values.filter(known), 0) || 1;
  const grid = make("div", { className: "bars", role: "list" });
  names.forEach((name, place) => {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${100 * (values[place] ?? 0) / most}%`;
    const mark = place === chosen ? "chosen" : "";
    grid.append(
      make("span", { className: mark, role: "listitem" }, name),
      make("span", { className: "track", title: words(values[place]), "aria-hidden": "true" }, bar),
      make("span", {}, short(values[place], 3)));
  });
  container.replaceChildren(make("h3", {}, title), grid);
}

function columnsChart(container, title, labels, values, words) {
  const width = 320, height = 120, left = 8, bottom = 20, most = Math.max(...values, 0) || 1;
  const step = (width - 2 * left) / values.length;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${words}` });
  values.forEach((value, place) => {
    const tall = (height - bottom - 8) * value / most;
    svg.append(draw("rect", { class: "column", x: left + place * step + step * 0.1, y: height - bottom - tall, width: step * 0.8, height: tall },
      draw("title", {}, document.createTextNode(`${labels[place]}: ${(100 * value).toFixed(1)} %`))));
  });
  const every = Math.ceil(values.length / 10);
  labels.forEach((text, place) => {
    if (place % every === 0) svg.append(draw("text", { x: left + (place + 0.5) * step, y: height - 5, "text-anchor": "middle" }, document.createTextNode(text)));
  });
  svg.append(draw("line", { class: "axis", x1: left, x2: width - left, y1: height - bottom, y2: height - bottom }));
  container.replaceChildren(make("h3", {}, title), svg, make("p", { className: "soft" }, words));
}

// One line over the layers for each series, with a band of `spread` around the first.
function curve(title, layers, series, { spread, chosen, choose, note }) {
  const width = 480, height = 170, left = 44, bottom = 24, top = 10;
  const all = series.flatMap((one) => one.values).filter(known);
  const around = spread ? series[0].values.flatMap((value, place) => (known(value) ? [value - spread[place], value + spread[place]] : [])) : [];
  const low = Math.min(0, ...all, ...around), high = Math.max(...all, ...around, low + 1e-9);
  const x = (place) => left + (layers.length > 1 ? place / (layers.length - 1) : 0.5) * (width - left - 12);
  const y = (value) => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  [low, (low + high) / 2, high].forEach((value) => svg.append(
    draw("line", { class: "axis", x1: left, x2: width - 12, y1: y(value), y2: y(value) }),
    draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, document.createTextNode(short(value)))));
  if (spread) {
    const here = layers.map((_, place) => place).filter((place) => known(series[0].values[place]));
    const edge = (sign) => (place) => `${x(place)},${y(series[0].values[place] + sign * spread[place])}`;
    svg.append(draw("polygon", { class: "band", points: [...here.map(edge(1)), ...here.reverse().map(edge(-1))].join(" ") }));
  }
  series.forEach((one, rank) => {
    const points = one.values.map((value, place) => (known(value) ? `${x(place)},${y(value)}` : null)).filter(known);
    svg.append(draw("polyline", { class: rank ? "curve second" : "curve", points: points.join(" ") }));
  });
  layers.forEach((layer, place) => {
    const value = series[0].values[place];
    if (!known(value)) return;
    const words = series.map((one) => `${one.name} ${short(one.values[place], 3)}`).join(", ");
    svg.append(draw("circle", { class: layer === chosen ? "dot chosen" : "dot", cx: x(place), cy: y(value), r: layer === chosen ? 6 : 4, onclick: () => choose(layer) },
      draw("title", {}, document.createTextNode(`${layerWord(layer)}: ${words}`))));
  });
  const every = Math.ceil(layers.length / 12);
  layers.forEach((layer, place) => {
    if (place % every === 0) svg.append(draw("text", { x: x(place), y: height - 6, "text-anchor": "middle" }, document.createTextNode(layer)));
  });
  return make("div", { className: "panel" }, make("h3", {}, title), svg, make("p", { className: "soft" }, note));
}

function plainTable(container, caption, heads, rows) {
  container.replaceChildren(make("table", { className: "plain" }, make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...heads.map((one) => make("th", { scope: "col" }, one)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((one, place) => (place ? make("td", {}, String(one)) : make("th", { scope: "row" }, String(one)))))))));
}
