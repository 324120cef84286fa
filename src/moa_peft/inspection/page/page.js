// The page: what is chosen, and what follows from it. The data is what the command counted; nothing is computed anew here.

const DATA = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const MEASURES = {
  mean_gate: { name: "mean gate", from: "router", fixed: [0, 1] },
  deviation: { name: "how much the gate varies", from: "router", fixed: [0, 0.5] },
  above_half_rate: { name: "tokens with a gate above 0.5", from: "router", fixed: [0, 1] },
  active_rate: { name: "tokens with a gate above 0", from: "router", fixed: [0, 1] },
  load: { name: "load", from: "router", fixed: [0, 1] },
  norm_share: { name: "share of the change", from: "group", fixed: [0, 1] },
  norm: { name: "length of the change", from: "group", fixed: null },
  effective_rank: { name: "effective rank", from: "group", fixed: null },
};
const AGREEMENT = { gate_correlation: "correlation of the gates", gate_difference: "mean difference of the gates", change_cka: "CKA of the changes" };
const state = { adapter: 0, view: "", measure: "", layer: 0, expert: "", prompt: 0, token: 0 };

const adapter = () => DATA.adapters[state.adapter];
const views = () => [...new Set([...adapter().routers, ...adapter().groups].map((one) => one.router))];
const viewName = (view) => (view === "" ? "the block's experts" : `copies of ${view}`);
const expertName = (name) => (state.view === "" ? name : `copy ${name}`);
const routersOf = (view) => new Map(adapter().routers.filter((one) => one.router === view).map((one) => [one.layer, one]));
const groupsOf = (view) => new Map(adapter().groups.filter((one) => one.router === view).map((one) => [one.layer, one]));
const figure = (one, name, measure) => {
  if (!one) return null;
  const from = MEASURES[measure].from === "router" ? one : one.changes;
  const place = from.names.indexOf(name);
  return place < 0 ? null : from[measure][place];
};
const namesIn = (found, from) => [...new Set([...found.values()].flatMap((one) => (from === "router" ? one.names : one.changes.names)))];
const stretch = () => at("stretch").checked;

function table(measure) {
  const found = MEASURES[measure].from === "router" ? routersOf(state.view) : groupsOf(state.view);
  return { found, names: namesIn(found, MEASURES[measure].from), layers: [...found.keys()] };
}

// Gates of one prompt in one router: rows of numbers, decoded once.
const decoded = new Map();
function gatesOf(prompt, router) {
  const index = adapter().routers.indexOf(router);
  const key = `${state.adapter}/${prompt}/${index}`;
  if (!decoded.has(key)) {
    const text = DATA.prompts[prompt].gates[state.adapter][index], rows = [];
    for (let start = 0; start < text.length; start += 2 * router.names.length) {
      rows.push(router.names.map((_, place) => (64 * LETTERS.indexOf(text[start + 2 * place]) + LETTERS.indexOf(text[start + 2 * place + 1])) / DATA.levels));
    }
    decoded.set(key, rows);
  }
  return decoded.get(key);
}
function tokenGate(prompt, token, layer, name) {
  const router = routersOf(state.view).get(layer);
  const column = router ? router.names.indexOf(name) : -1;
  if (column < 0) return null;
  const rows = gatesOf(prompt, router);
  return rows[rows.length === 1 ? 0 : token]?.[column] ?? null;
}

function drawHeat() {
  const measure = MEASURES[state.measure], { found, names, layers } = table(state.measure);
  const values = names.map((name) => layers.map((layer) => figure(found.get(layer), name, state.measure)));
  const range = rangeOf(values.flat(), stretch() || !measure.fixed, measure.fixed);
  heat(at("heat"), {
    caption: `${measure.name}, by expert and layer`, rows: names.map(expertName), columns: layers, range,
    value: (r, c) => values[r][c],
    label: (r, c, value) => `${expertName(names[r])}, ${layerWord(layers[c])}: ${measure.name} ${short(value, 3)}`,
    chosen: (r, c) => names[r] === state.expert && layers[c] === state.layer,
    choose: (r, c) => { state.expert = names[r]; state.layer = layers[c]; refresh(); },
  });
  legend(at("heat-legend"), range, measure.name);
  at("measure-note").textContent = DATA.notes[state.measure] ?? "";
}

function drawTokens() {
  const prompt = DATA.prompts[state.prompt], container = at("tokens");
  if (!prompt) return;
  const values = prompt.pieces.map((_, token) => tokenGate(state.prompt, token, state.layer, state.expert));
  const range = rangeOf(values, stretch(), [0, 1]);
  container.replaceChildren(...prompt.pieces.flatMap((piece, token) => {
    const kind = DATA.classes[prompt.classes[token]];
    const words = `token ${token}, ${kind}, gate ${short(values[token], 3)}`;
    const node = make("span", { role: "button", tabindex: token === state.token ? "0" : "-1", "aria-pressed": String(token === state.token),
      title: words, className: kind === "special" ? "special" : "", onclick: () => chooseToken(token) }, piece.replaceAll("\n", "⏎\n"));
    node.setAttribute("aria-label", `${piece}: ${words}`);
    node.dataset.token = token;
    return [shade(node, values[token], range)];
  }));
  legend(at("token-legend"), range, `gate of ${expertName(state.expert)} in ${layerWord(state.layer)}`);
  drawReadout();
  if (at("token-table").open) drawTokenTable();
}

function drawReadout() {
  const prompt = DATA.prompts[state.prompt], piece = prompt.pieces[state.token] ?? "";
  const gate = tokenGate(state.prompt, state.token, state.layer, state.expert);
  at("readout").replaceChildren(
    make("strong", {}, `“${piece.replaceAll("\n", "⏎")}”`), ` token ${state.token}, ${DATA.classes[prompt.classes[state.token]]}: gate of ${expertName(state.expert)} in ${layerWord(state.layer)} `,
    make("strong", { id: "gate" }, short(gate, 3)));
  const { names, layers } = table("mean_gate");
  const values = names.map((name) => layers.map((layer) => tokenGate(state.prompt, state.token, layer, name)));
  const range = rangeOf(values.flat(), stretch(), [0, 1]);
  heat(at("token-heat"), {
    caption: "this token's gates in all layers", rows: names.map(expertName), columns: layers, range,
    value: (r, c) => values[r][c],
    label: (r, c, value) => `${expertName(names[r])}, ${layerWord(layers[c])}: gate ${short(value, 3)}`,
    chosen: (r, c) => names[r] === state.expert && layers[c] === state.layer,
    choose: (r, c) => { state.expert = names[r]; state.layer = layers[c]; refresh(); },
  });
}

function drawTokenTable() {
  const prompt = DATA.prompts[state.prompt];
  plainTable(at("token-table").querySelector("div"), `gate of ${expertName(state.expert)} in ${layerWord(state.layer)}`, ["token", "text", "class", "gate"],
    prompt.pieces.map((piece, token) => [token, JSON.stringify(piece), DATA.classes[prompt.classes[token]], short(tokenGate(state.prompt, token, state.layer, state.expert), 3)]));
}

function chooseToken(token) {
  state.token = token;
  for (const node of at("tokens").children) {
    const on = Number(node.dataset.token) === token;
    node.setAttribute("aria-pressed", String(on));
    node.tabIndex = on ? 0 : -1;
  }
  drawReadout();
}

function drawMatrix(id, title, names, rows) {
  const places = names.map((_, place) => place).filter((r) => rows[r].some((value, c) => r !== c && known(value)));
  at(id).hidden = !places.length;
  const chosen = places.map((place) => expertName(names[place]));
  heat(at(id), { caption: title, rows: chosen, columns: chosen, range: id === "cosine" ? [-1, 1] : [0, 1],
    value: (r, c) => rows[places[r]][places[c]], label: (r, c, value) => `${chosen[r]} and ${chosen[c]}: ${short(value, 3)}` });
}

function drawLayer() {
  const router = routersOf(state.view).get(state.layer), group = groupsOf(state.view).get(state.layer)?.changes;
  at("layer-name").textContent = `${state.layer}, ${viewName(state.view)}`;
  for (const id of ["load", "counts", "classes", "positions"]) at(id).hidden = !router;
  at("thresholds").hidden = !router?.threshold;
  at("norms").hidden = !group;
  const share = (value) => `${(100 * (value ?? 0)).toFixed(1)} %`;
  if (router) {
    bars(at("load"), `Load (variation ${short(router.load_variation, 3)})`, router.names.map(expertName), router.load, router.names.indexOf(state.expert), share);
    columnsChart(at("counts"), "Active experts of a token", router.active_counts.map((_, place) => String(place)), router.active_counts,
      `On average ${short(router.active_experts)} of ${router.names.length} gates are above 0.`);
    if (router.threshold) {
      const { bins, mean, deviation } = router.threshold;
      const last = Math.max(...bins.map((value, place) => (value > 0 ? place : 0))) + 1, wide = Math.ceil(last / 25);
      const joined = Array.from({ length: Math.ceil(last / wide) }, (_, place) => bins.slice(place * wide, (place + 1) * wide).reduce((a, b) => a + b, 0));
      columnsChart(at("thresholds"), "Thresholds of the tokens", joined.map((_, place) => (place * wide / bins.length).toFixed(2)), joined, `Mean ${short(mean, 3)}, standard deviation ${short(deviation, 3)}.`);
    }
    const by = (id, caption, columns, rows) => {
      const places = columns.map((_, place) => place).filter((place) => rows[place].some(known));
      at(id).hidden = !places.length;
      const values = router.names.map((_, expert) => places.map((place) => rows[place][expert]));
      heat(at(id), { caption, rows: router.names.map(expertName), columns: places.map((place) => columns[place]), range: rangeOf(values.flat(), stretch(), [0, 1]),
        value: (r, c) => values[r][c], label: (r, c, value) => `${expertName(router.names[r])}, ${columns[places[c]]}: mean gate ${short(value, 3)}` });
    };
    by("classes", "mean gate by class of token", DATA.classes, router.by_class);
    by("positions", "mean gate by position in the prompt", DATA.positions, router.by_position);
  }
  if (group) bars(at("norms"), "Share of the change", group.names.map(expertName), group.norm_share, group.names.indexOf(state.expert), share);
  drawMatrix("cka", "similarity of the changes, linear CKA", group?.names ?? [], group?.cka);
  drawMatrix("cosine", "mean cosine of changes to one output", group?.names ?? [], group?.cosine);
  const names = [...new Set([...(router?.names ?? []), ...(group?.names ?? [])])];
  plainTable(at("numbers"), `layer ${state.layer}, ${viewName(state.view)}`, ["expert", ...Object.values(MEASURES).map((one) => one.name), "captured"],
    names.map((name) => [expertName(name), ...Object.keys(MEASURES).map((measure) => short(figure(MEASURES[measure].from === "router" ? router : { changes: group ?? { names: [] } }, name, measure), 3)),
      short(group?.captured[group.names.indexOf(name)], 4)]));
}

function drawCurves() {
  const routers = routersOf(state.view), groups = groupsOf(state.view), layers = [...new Set([...routers.keys(), ...groups.keys()])].sort((a, b) => a - b);
  const choose = (layer) => { state.layer = layer; refresh(); };
  const of = (name, get) => ({ name, values: layers.map(get) });
  const all = [
    ["Load variation", of("load variation", (layer) => routers.get(layer)?.load_variation ?? null), DATA.notes.load_variation],
    ["Evenness of a token's gates", of("entropy", (layer) => routers.get(layer)?.entropy ?? null), DATA.notes.entropy],
    ["Active experts of a token", of("active experts", (layer) => routers.get(layer)?.active_experts ?? null), DATA.notes.active_experts],
    ["Threshold", of("threshold", (layer) => routers.get(layer)?.threshold?.mean ?? null), DATA.notes.threshold, layers.map((layer) => routers.get(layer)?.threshold?.deviation ?? 0)],
    ["Similarity of two experts", of("mean CKA", (layer) => groups.get(layer)?.mean_cka ?? null), DATA.notes.mean_cka],
  ].filter(([, series]) => series.values.some(known));
  at("curves").replaceChildren(...all.map(([title, series, note, spread]) => curve(title, layers, [series], { spread, chosen: state.layer, choose, note })));
  plainTable(at("curve-table"), viewName(state.view), ["layer", ...all.map(([title]) => title)], layers.map((layer, place) => [layer, ...all.map(([, series]) => short(series.values[place], 3))]));
}

function drawAgreement() {
  const found = DATA.agreement.filter((one) => one.router === state.view), measure = at("agreement-measure").value;
  const names = [...new Set(found.flatMap((one) => one.names))];
  const values = names.map((name) => found.map((one) => one[measure][one.names.indexOf(name)] ?? null));
  const range = measure === "gate_correlation" ? [-1, 1] : measure === "change_cka" ? [0, 1] : rangeOf(values.flat(), true);
  heat(at("agreement"), { caption: AGREEMENT[measure], rows: names.map(expertName), columns: found.map((one) => one.layer), range, value: (r, c) => values[r][c],
    label: (r, c, value) => `${expertName(names[r])}, ${layerWord(found[c].layer)}: ${AGREEMENT[measure]} ${short(value, 3)}` });
  legend(at("agreement-legend"), range, AGREEMENT[measure]);
}

function options(node, values, names, chosen) {
  node.replaceChildren(...values.map((value, place) => make("option", { value: String(value), selected: String(value) === String(chosen) ? "" : null }, names[place])));
}

// Keep what is chosen within what there is, then draw everything.
function refresh() {
  if (!views().includes(state.view)) state.view = views()[0];
  const hasRouter = routersOf(state.view).size > 0;
  const measures = Object.keys(MEASURES).filter((one) => (MEASURES[one].from === "router" ? hasRouter : groupsOf(state.view).size > 0));
  if (!measures.includes(state.measure)) state.measure = measures[0];
  const { names, layers } = table(hasRouter ? "mean_gate" : state.measure);
  const every = new Set([...names, ...table(state.measure).names]);
  if (!every.has(state.expert)) state.expert = names[0];
  if (!layers.includes(state.layer)) state.layer = layers[0];
  options(at("view"), views(), views().map(viewName), state.view);
  options(at("measure"), measures, measures.map((one) => MEASURES[one].name), state.measure);
  options(at("layer"), layers, layers.map(String), state.layer);
  options(at("expert"), names, names.map(expertName), state.expert);
  at("view-choice").hidden = views().length < 2;
  at("texts-section").hidden = !hasRouter;
  drawHeat();
  if (hasRouter) drawTokens();
  drawLayer();
  drawCurves();
  if (DATA.agreement.length) drawAgreement();
}

function start() {
  const number = { adapter: true, layer: true, prompt: true };
  for (const id of ["adapter", "view", "measure", "layer", "expert", "prompt"]) {
    at(id).addEventListener("change", () => {
      state[id] = number[id] ? Number(at(id).value) : at(id).value;
      if (id === "prompt") state.token = 0;
      refresh();
    });
  }
  at("stretch").addEventListener("change", refresh);
  at("token-table").addEventListener("toggle", drawTokens);
  at("tokens").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    const next = state.token + step;
    if (!step || !at("tokens").children[next]) return;
    event.preventDefault();
    chooseToken(next);
    at("tokens").children[next].focus();
  });
  at("tokens").addEventListener("keyup", (event) => {
    if (event.key === "Enter" || event.key === " ") event.target.click?.();
  });
  at("adapter-choice").hidden = DATA.adapters.length < 2;
  options(at("adapter"), DATA.adapters.map((_, place) => place), DATA.adapters.map((one) => one.title), 0);
  options(at("prompt"), DATA.prompts.map((_, place) => place), DATA.prompts.map((one) => `${one.number}: ${one.start}`), 0);
  at("agreement-section").hidden = !DATA.agreement.length;
  const hasAgreement = (measure) => DATA.agreement.some((one) => one[measure].some(known)); // routers of two kinds share no gates
  options(at("agreement-measure"), Object.keys(AGREEMENT), Object.values(AGREEMENT), Object.keys(AGREEMENT).find(hasAgreement));
  at("agreement-measure").addEventListener("change", drawAgreement);
  const first = DATA.adapters[0].routers[0] ?? DATA.adapters[0].groups[0];
  state.view = first.router;
  state.layer = DATA.start_layer ?? first.layer;
  state.expert = DATA.start_expert ?? "";
  state.token = Math.max(DATA.prompts[0]?.classes.indexOf(1) ?? 0, 0);
  refresh();
}
start();
