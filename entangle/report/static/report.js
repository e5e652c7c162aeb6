"use strict";
/* Draws the page's live figures, cards and table from the JSON beside it. Text from data goes through textContent only. */
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const withPairs = content.runs.map((run, number) => (run.pairs ? number : -1)).filter((number) => number >= 0);
  const state = { run: withPairs[0] ?? 0, loss: null, cards: 5, printing: false, sort: "index", up: true, order: [] };
  const ROW = 30, FOLDED = 300, WORDS = 900, PRINTED = 60, PRINTED_COLUMNS = 8, PRINT_WIDTH = 660;

  // --- small helpers -------------------------------------------------------------------------------------------

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  const at = (column, place) => (Array.isArray(column) ? column[place] : column);
  const isInfinite = (value) => Math.abs(value) >= content.infinite;

  function number(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    if (isInfinite(value)) return value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    const short = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)));
    return short.replace("-", "−");
  }
  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  const pairsOf = (run) => content.runs[run].pairs;
  const lossOf = (run) => pairsOf(run).losses.find((loss) => loss.label === state.loss) ?? pairsOf(run).losses[0];
  const indexOf = (run, place) => at(pairsOf(run).columns.index, place);
  const placeOf = (run, index) => pairsOf(run).columns.index.indexOf(index);
  const regimeOf = (loss, place) => content.regimes[loss.regimes.charCodeAt(place) - 48];
  const anchor = (run, index) => (run === 0 ? "" : `run${run + 1}-`) + `pair-${index}`;
  const textOf = (run, side, place) => pairsOf(run).texts?.[side][place] ?? "";

  function valueOf(run, name, place) {
    const pairs = pairsOf(run);
    if (name === "regime") return lossOf(run).regimes.charCodeAt(place);
    if (name === "epoch") return lossOf(run).epochs?.charCodeAt(place) ?? null;
    if (name === "change_chosen" || name === "change_rejected") return at(lossOf(run)[name], place);
    if (name === "kind") return pairs.columns.kind.names[pairs.columns.kind.codes[place]];
    return at(pairs.columns[name], place);
  }

  function flagsOf(run, place) {
    return Object.entries(pairsOf(run).columns.flags).filter(([, places]) => places.includes(place)).map(([name]) => name);
  }

  function sentence(run, place) {
    const loss = lossOf(run);
    const d_w = at(loss.d_w, place), d_l = at(loss.d_l, place);
    const values = {
      d_w, d_l, rho: d_l ? d_w / d_l : content.infinite, ratio_chosen: valueOf(run, "ratio_chosen", place),
      ratio_rejected: valueOf(run, "ratio_rejected", place), lower: valueOf(run, "band_lower", place),
      upper: valueOf(run, "band_upper", place),
    };
    return content.sentences[loss.sentences.charCodeAt(place) - 48]
      .replace(/\{(\w+)(?::\.(\d)([fg]))?\}/g, (_, name, digits, form) =>
        name === "loss" ? loss.label : form === "f" ? values[name].toFixed(digits) : number(values[name], Number(digits)));
  }

  // --- live figures --------------------------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";
  const EDGE = { left: 60, right: 14, top: 12, bottom: 46 }, NEAR = 18, DRAGGED = 6;
  const CORNERS = { ideal: [1, 1], both_up: [1, 0], both_down: [0, 1], inverted: [0, 0] };

  function shape(tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  /* One mark as a part of a path, with one capital M: circle, triangles, square, cross. */
  const MARKS = {
    o: (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    "^": (x, y, r) => `M${x - r} ${y + 0.8 * r}h${2 * r}l${-r} ${-1.8 * r}z`,
    v: (x, y, r) => `M${x - r} ${y - 0.8 * r}h${2 * r}l${-r} ${1.8 * r}z`,
    s: (x, y, r) => `M${x - 0.9 * r} ${y - 0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
    x: (x, y, r) => `M${x - r} ${y - r}l${2 * r} ${2 * r}m0 ${-2 * r}l${-2 * r} ${2 * r}`,
  };
  const filled = (regime) => (regime.mark === "x" ? `fill:none;stroke:${regime.colour};stroke-width:1.2` : `fill:${regime.colour};fill-opacity:.8`);
  const round = (value) => Math.round(10 * value) / 10;
  const height = (cosine) => -Math.acos(Math.max(-1, Math.min(1, cosine))); // near 1, where entangled pairs are, cosines crowd
  const everyPlace = (run) => [...Array(pairsOf(run).count).keys()];
  const largest = (values) => values.reduce((most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most), 0);

  /* What is drawn: x and y of every pair, the ends and ticks of both axes, lines, and what is said of a pair. */
  const VIEWS = {
    plane(run) {
      const loss = lossOf(run), columns = pairsOf(run).columns, places = everyPlace(run);
      const xs = places.map((place) => Math.log(at(columns.norm_ratio, place))), ys = places.map((place) => height(at(columns.cosine, place)));
      const reach = Math.max(1, 1.08 * largest(xs));
      const least = places.reduce((low, place) => Math.min(low, at(columns.cosine, place) ?? 0), 0);
      const view = {
        xs, ys, x: { title: "norm ratio |g_l| / |g_w|", ends: [-reach, reach] }, y: { title: "cosine", ends: [height(Math.max(-1, least - 0.08)), 0.06] },
        lines: [], told: (place) => [
          `cosine ${number(at(columns.cosine, place))}, norm ratio ${number(at(columns.norm_ratio, place))}`,
          `ideal for rho from ${number(at(columns.band_lower, place))} to ${number(at(columns.band_upper, place))}`,
        ],
      };
      view.x.ticks = [1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 64].map((tick) => [Math.log(tick), tick < 1 ? `1/${1 / tick}` : String(tick)]);
      view.y.ticks = [1, 0.999, 0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0, -0.25, -0.5, -0.75, -1].map((tick) => [height(tick), number(tick)]);
      if (loss.rho > 0 && !isInfinite(loss.rho)) {
        const middle = Math.log(loss.rho);
        const path = [...Array(401).keys()].map((i) => 2 * reach * (i / 200 - 1)).concat(middle).sort((a, b) => a - b);
        view.lines.push({
          points: path.map((x) => [x, height(Math.exp(-Math.abs(x - middle)))]), isDashed: loss.rho_varies,
          text: `border of ideal, ${loss.label} (rho ${loss.rho_varies ? "median " : ""}${number(loss.rho, 3)})`,
        });
      }
      const whole = content.runs[run].set;
      if (whole) {
        const across = whole.norm_ratio.map(Math.log), up = whole.cosine.map(height);
        view.whole = { x: across[0], y: up[0], bars: [[[across[1], up[0]], [across[2], up[0]]], [[across[0], up[1]], [across[0], up[2]]]], isHollow: whole.hollow, text: whole.text };
      }
      return view;
    },

    changes(run) {
      const loss = lossOf(run), places = everyPlace(run);
      const sizes = places.flatMap((place) => [at(loss.change_chosen, place), at(loss.change_rejected, place)].map(Math.abs)).filter((size) => size > 0).sort((a, b) => a - b);
      const unit = sizes[Math.floor(sizes.length / 5)] || 1, most = sizes.at(-1) || 1, edge = 1.07 * Math.asinh(most / unit);
      const bend = (value) => (value === null ? NaN : Math.asinh(value / unit));
      const powers = [];
      for (let power = Math.ceil(Math.log10(unit)); power <= Math.log10(most); power++) powers.push(power);
      const shown = powers.filter((_, i) => i % Math.ceil(powers.length / 4) === 0).map((power) => 10 ** power);
      const ticks = [...shown.map((size) => [-bend(size), number(-size)]).reverse(), [0, "0"], ...shown.map((size) => [bend(size), number(size)])];
      const axis = (title) => ({ title, ticks, ends: [-edge, edge], middle: 0 });
      return {
        xs: places.map((place) => bend(at(loss.change_chosen, place))), ys: places.map((place) => bend(at(loss.change_rejected, place))),
        x: axis("change of the chosen"), y: axis("change of the rejected"), lines: [], corners: CORNERS,
        told: (place) => [`chosen ${signed(at(loss.change_chosen, place))}, rejected ${signed(at(loss.change_rejected, place))} nats per unit learning rate`],
      };
    },
  };

  /* Key of a live figure -> what is drawn now, where on the screen its points are, and what part of it is looked at. */
  const drawn = {};

  function draw(key) {
    const { view: name, run } = content.live[key], target = byId(`figure-${key}`), loss = lossOf(run);
    const view = VIEWS[name](run), part = drawn[key]?.part ?? null;
    const width = state.printing ? PRINT_WIDTH : target.clientWidth || PRINT_WIDTH, tall = target.clientHeight || 470;
    const ends = { x: part?.x ?? view.x.ends, y: part?.y ?? view.y.ends };
    const right = width - EDGE.right, bottom = tall - EDGE.bottom;
    const toX = (x) => EDGE.left + ((x - ends.x[0]) / (ends.x[1] - ends.x[0])) * (right - EDGE.left);
    const toY = (y) => bottom - ((y - ends.y[0]) / (ends.y[1] - ends.y[0])) * (bottom - EDGE.top);
    const svg = shape("svg", { viewBox: `0 0 ${width} ${tall}`, width, height: tall, "aria-hidden": "true" });
    const clip = shape("clipPath", { id: `clip-${key}` });
    clip.append(shape("rect", { x: EDGE.left, y: EDGE.top, width: right - EDGE.left, height: bottom - EDGE.top }));
    svg.append(clip, axes(view, ends, toX, toY, right, bottom));
    const inside = shape("g", { "clip-path": `url(#clip-${key})` });
    for (const line of view.lines) {
      const path = line.points.map(([x, y], i) => `${i ? "L" : "M"}${round(toX(x))} ${round(toY(y))}`).join("");
      inside.append(shape("path", { class: "border", d: path, ...(line.isDashed ? { "stroke-dasharray": "6 4" } : {}) }));
    }
    const size = view.xs.length > 3000 ? 2 : view.xs.length > 200 ? 3.5 : 4.5;
    const screen = view.xs.map((x, place) => [round(toX(x)), round(toY(view.ys[place]))]);
    const paths = content.regimes.map(() => []);
    screen.forEach(([x, y], place) => {
      const code = loss.regimes.charCodeAt(place) - 48;
      if (Number.isFinite(x) && Number.isFinite(y)) paths[code].push(MARKS[content.regimes[code].mark](x, y, size));
    });
    const points = shape("g", { class: "points" });
    content.regimes.forEach((regime, code) => {
      if (paths[code].length) points.append(shape("path", { d: paths[code].join(""), style: filled(regime) }));
    });
    inside.append(points);
    if (view.whole) inside.append(wholeMark(view.whole, toX, toY));
    const ring = shape("circle", { class: "ring", r: size + 3, visibility: "hidden" });
    const rectangle = shape("rect", { class: "zoomed", visibility: "hidden" });
    svg.append(inside, ring, rectangle);
    const tip = target.querySelector(".tip") ?? element("div", "", "tip");
    tip.hidden = true;
    tip.dir = "auto";
    target.replaceChildren(svg, tip);
    const isNew = !drawn[key];
    drawn[key] = { part, view, ends, screen, ring, rectangle, tip, right, bottom, at: null };
    showTools(key, paths.map((marks) => marks.length));
    if (isNew) follow(target, key, run);
  }

  const diamond = (x, y, r) => `M${round(x)} ${round(y - r)}l${r} ${r}l${-r} ${r}l${-r} ${-r}z`;
  const wholeStyle = (whole) => `fill:${whole.isHollow ? "var(--card)" : "var(--ink)"};stroke:var(--ink);stroke-width:1.8`;

  /* The set as one pair: a diamond with both intervals. */
  function wholeMark(whole, toX, toY) {
    const group = shape("g", { class: "whole" });
    for (const [from, to] of whole.bars) {
      const d = `M${round(toX(from[0]))} ${round(toY(from[1]))}L${round(toX(to[0]))} ${round(toY(to[1]))}`;
      group.append(shape("path", { d, style: "fill:none;stroke:var(--ink);stroke-width:1.8" }));
    }
    const mark = shape("path", { d: diamond(toX(whole.x), toY(whole.y), 7), style: wholeStyle(whole) });
    mark.append(shape("title", {}, whole.text));
    group.append(mark);
    return group;
  }

  function axes(view, ends, toX, toY, right, bottom) {
    const group = shape("g", {});
    const isIn = (value, [from, to]) => value >= from && value <= to;
    let lastX = -Infinity, lastY = Infinity;
    for (const [place, text] of view.x.ticks.filter(([place]) => isIn(place, ends.x))) {
      const x = round(toX(place));
      group.append(shape("path", { class: "grid", d: `M${x} ${EDGE.top}V${bottom}` }));
      if (x - lastX < 34) continue;
      lastX = x;
      group.append(shape("text", { x, y: bottom + 17, "text-anchor": "middle" }, text));
    }
    for (const [place, text] of view.y.ticks.filter(([place]) => isIn(place, ends.y)).sort((a, b) => a[0] - b[0])) {
      const y = round(toY(place));
      group.append(shape("path", { class: "grid", d: `M${EDGE.left} ${y}H${right}` }));
      if (lastY - y < 14) continue;
      lastY = y;
      group.append(shape("text", { x: EDGE.left - 6, y: y + 4, "text-anchor": "end" }, text));
    }
    if (view.x.middle !== undefined && isIn(0, ends.x)) group.append(shape("path", { class: "axis", d: `M${toX(0)} ${EDGE.top}V${bottom}` }));
    if (view.y.middle !== undefined && isIn(0, ends.y)) group.append(shape("path", { class: "axis", d: `M${EDGE.left} ${toY(0)}H${right}` }));
    group.append(shape("path", { class: "axis", fill: "none", d: `M${EDGE.left} ${EDGE.top}V${bottom}H${right}` }));
    group.append(shape("text", { x: (EDGE.left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, view.x.title));
    group.append(shape("text", { transform: `translate(14 ${(EDGE.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, view.y.title));
    for (const regime of content.regimes) {
      const corner = view.corners?.[regime.name];
      if (corner) {
        group.append(shape("text", {
          x: corner[0] ? right - 6 : EDGE.left + 6, y: corner[1] ? bottom - 8 : EDGE.top + 14, "text-anchor": corner[0] ? "end" : "start",
        }, regime.text));
      }
    }
    return group;
  }

  /* Below a live figure: what its marks and its line mean, the whole view again, the drawing as a file. */
  function showTools(key, counts) {
    const list = element("ul"), tools = byId(`tools-${key}`);
    content.regimes.forEach((regime, code) => {
      if (counts[code]) list.append(legendItem(shape("path", { d: MARKS[regime.mark](7, 7, 5), style: filled(regime) }), `${regime.text} (${counts[code]})`));
    });
    for (const line of drawn[key].view.lines) {
      const sample = shape("path", { d: "M0 7H14", style: `stroke:var(--ink);stroke-width:2${line.isDashed ? ";stroke-dasharray:4 3" : ""}` });
      list.append(legendItem(sample, line.text));
    }
    const set = drawn[key].view.whole;
    if (set) list.append(legendItem(shape("path", { d: diamond(7, 7, 6), style: wholeStyle(set) }), set.text));
    const whole = button("Whole view", () => look(key, null)), file = button("Save as SVG", () => save(key));
    whole.hidden = !drawn[key].part;
    const part = sample(content.live[key].run);
    if (part) list.append(element("li", `${pairsOf(content.live[key].run).count} pairs shown${part}`, "sampled"));
    tools.replaceChildren(list, whole, file);
  }

  function legendItem(sample, text) {
    const item = element("li"), icon = shape("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }), words = element("bdi", text);
    icon.append(sample);
    item.append(icon, words);
    return item;
  }

  function button(text, action) {
    const made = element("button", text);
    made.type = "button";
    made.addEventListener("click", action);
    return made;
  }

  function look(key, part) {
    drawn[key].part = part;
    draw(key);
  }

  /* The drawing with the colours that it has now, as a file of its own. */
  function save(key) {
    const original = byId(`figure-${key}`).querySelector("svg"), copy = original.cloneNode(true);
    const from = original.querySelectorAll("*");
    copy.querySelectorAll("*").forEach((made, i) => {
      const style = getComputedStyle(from[i]);
      for (const name of ["fill", "stroke", "stroke-width", "fill-opacity", "visibility"]) made.style.setProperty(name, style.getPropertyValue(name));
      if (made.tagName === "text") made.style.font = "12px sans-serif";
    });
    copy.setAttribute("xmlns", SVG);
    keep(copy.outerHTML, "image/svg+xml", `${content.live[key].view}.svg`);
  }

  /* A text as a file of the reader's. */
  function keep(text, type, name) {
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  /* The pair nearest to a place of the screen that is in sight; null if none is near. */
  function nearest(key, x, y, reach) {
    const { screen, right, bottom } = drawn[key];
    let best = null, least = reach * reach;
    screen.forEach(([px, py], place) => {
      const far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least && px >= EDGE.left && px <= right && py >= EDGE.top && py <= bottom) [best, least] = [place, far];
    });
    return best;
  }

  /* Point out a pair: a ring around it, its numbers beside it, its texts under the figure. */
  function pointOut(key, run, place) {
    const now = drawn[key];
    if (place === now.at) return;
    now.at = place;
    now.tip.hidden = place === null;
    now.ring.setAttribute("visibility", place === null ? "hidden" : "visible");
    if (place === null) return;
    const [x, y] = now.screen[place];
    now.ring.setAttribute("cx", x);
    now.ring.setAttribute("cy", y);
    now.tip.textContent = [`pair ${indexOf(run, place)}: ${regimeOf(lossOf(run), place).text}`, ...now.view.told(place)].join("\n");
    const box = now.tip.parentElement;
    now.tip.style.left = `${Math.max(0, Math.min(x + 12, box.clientWidth - now.tip.offsetWidth - 4))}px`;
    now.tip.style.top = `${y + 14 + now.tip.offsetHeight > box.clientHeight ? y - now.tip.offsetHeight - 10 : y + 14}px`;
    const parts = ["chosen", "rejected"].map((side) => `${side}: ${textOf(run, side, place).trim().slice(0, 110) || "(no text)"}`);
    byId(`beside-${key}`).textContent = `Pair ${indexOf(run, place)}. ${parts.join(" · ")}`;
  }

  /* Hover points a pair out, a click opens its card; dragging looks closer, with Shift it moves; two clicks go back. */
  function follow(target, key, run) {
    let from = null;
    const spot = (event) => {
      const box = target.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const isDrag = ([x, y]) => from && (Math.abs(x - from.spot[0]) > DRAGGED || Math.abs(y - from.spot[1]) > DRAGGED);
    const toData = ([x, y]) => {
      const { ends, right, bottom } = drawn[key];
      const share = [(x - EDGE.left) / (right - EDGE.left), (bottom - y) / (bottom - EDGE.top)].map((value) => Math.max(0, Math.min(1, value)));
      return [ends.x[0] + share[0] * (ends.x[1] - ends.x[0]), ends.y[0] + share[1] * (ends.y[1] - ends.y[0])];
    };
    target.addEventListener("pointerdown", (event) => {
      if (event.button === 0) from = { spot: spot(event), isMoving: event.shiftKey, canDrag: event.pointerType !== "touch" };
    });
    target.addEventListener("pointermove", (event) => {
      const to = spot(event);
      if (!from?.canDrag || !isDrag(to)) {
        pointOut(key, run, nearest(key, ...to, NEAR));
        target.style.cursor = drawn[key].at === null ? "" : "pointer";
        return;
      }
      if (!target.hasPointerCapture(event.pointerId)) target.setPointerCapture(event.pointerId);
      pointOut(key, run, null);
      if (from.isMoving) return;
      const { rectangle } = drawn[key];
      for (const [name, value] of Object.entries({
        x: Math.min(to[0], from.spot[0]), y: Math.min(to[1], from.spot[1]), width: Math.abs(to[0] - from.spot[0]), height: Math.abs(to[1] - from.spot[1]),
        visibility: "visible",
      })) rectangle.setAttribute(name, value);
    });
    target.addEventListener("pointerup", (event) => {
      const start = from, to = spot(event), wasDrag = from?.canDrag && isDrag(to);
      from = null;
      if (!start) return;
      if (!wasDrag) {
        const place = nearest(key, ...to, event.pointerType === "touch" ? 2 * NEAR : NEAR);
        if (place !== null) go(run, indexOf(run, place));
        return;
      }
      const [a, b] = [toData(start.spot), toData(to)], { ends } = drawn[key];
      const moved = (axis, i) => ends[axis].map((end) => end + a[i] - b[i]);
      look(key, start.isMoving
        ? { x: moved("x", 0), y: moved("y", 1) }
        : { x: [Math.min(a[0], b[0]), Math.max(a[0], b[0])], y: [Math.min(a[1], b[1]), Math.max(a[1], b[1])] });
    });
    target.addEventListener("pointerleave", () => { if (!from) pointOut(key, run, null); });
    target.addEventListener("pointercancel", () => { from = null; });
    target.addEventListener("dblclick", () => look(key, null));
    target.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key], now = drawn[key].at;
      if (step) {
        event.preventDefault();
        const order = everyPlace(run).filter((place) => Number.isFinite(drawn[key].screen[place][0])).sort((a, b) => drawn[key].screen[a][0] - drawn[key].screen[b][0]);
        const next = now === null ? (step > 0 ? 0 : order.length - 1) : (order.indexOf(now) + step + order.length) % order.length;
        if (order.length) pointOut(key, run, order[next]);
      } else if (event.key === "Enter" && now !== null) go(run, indexOf(run, now));
    });
  }

  function drawAll() {
    for (const key of Object.keys(content.live)) draw(key);
  }

  // --- cards ---------------------------------------------------------------------------------------------------

  const FACTS = [
    ["cosine", "cosine", "cosine"], ["norm_ratio", "norm ratio", "norm_ratio"], ["length_chosen", "tokens, chosen", "length"],
    ["length_rejected", "tokens, rejected", "length"],
  ];
  const REST = [
    ["ratio_chosen", "c / A", "ratio_chosen"], ["ratio_rejected", "c / B", "ratio_rejected"],
    ["logps_chosen", "log-prob, chosen", "logps"], ["logps_rejected", "log-prob, rejected", "logps"],
    ["prompt_length", "tokens, prompt", "length"],
  ];

  function fact(list, name, value, key) {
    const item = element("div"), head = element("dt"), told = element("dd", value);
    told.dir = "auto";
    if (key) {
      const link = element("a", name, "term");
      link.href = `#def-${key}`;
      head.append(link);
    } else head.textContent = name;
    item.append(head, told);
    list.append(item);
  }

  function card(run, place) {
    const made = byId("card").content.firstElementChild.cloneNode(true);
    const index = indexOf(run, place), loss = lossOf(run), regime = regimeOf(loss, place), pairs = pairsOf(run);
    made.id = anchor(run, index);
    const link = made.querySelector(".anchor");
    link.textContent = `Pair ${index}`;
    link.href = `#${made.id}`;
    for (const [name, by] of [["before", -1], ["after", 1]]) {
      const other = beside(run, place, by), turn = made.querySelector(`.${name}`);
      turn.disabled = other === null;
      turn.addEventListener("click", () => go(run, indexOf(run, other)));
    }
    const badge = made.querySelector(".badge");
    badge.textContent = regime.text;
    badge.style.borderColor = regime.colour;
    made.querySelector(".reason").textContent = sentence(run, place);
    const list = made.querySelector(".facts");
    fact(list, "change, chosen", signed(at(loss.change_chosen, place)), "change");
    fact(list, "change, rejected", signed(at(loss.change_rejected, place)), "change");
    if (loss.epochs) fact(list, "over an epoch", content.regimes[Number(loss.epochs[place])]?.text ?? "not measured", "across");
    fact(list, "ideal band", `${number(valueOf(run, "band_lower", place), 3)} to ${number(valueOf(run, "band_upper", place), 3)}`, "band");
    fact(list, "d_w, d_l", `${number(at(loss.d_w, place), 3)}, ${number(at(loss.d_l, place), 3)}`, "incentives");
    for (const [name, text, key] of FACTS) fact(list, text, number(valueOf(run, name, place)), key);
    const rest = made.querySelector(".rest");
    for (const [name, text, key] of REST) fact(rest, text, number(valueOf(run, name, place)), key);
    if (valueOf(run, "log_ratio_chosen", place) !== null) {
      for (const side of ["chosen", "rejected"]) fact(rest, `log-ratio, ${side}`, signed(valueOf(run, `log_ratio_${side}`, place)), "reward");
    }
    for (const extra of content.runs[run].extra) fact(rest, extra.text, number(valueOf(run, extra.name, place)), extra.term);
    if (pairs.columns.kind) fact(list, "kind", valueOf(run, "kind", place));
    const flags = flagsOf(run, place);
    if (flags.length) fact(list, "flags", flags.join(", "));
    fillTexts(made, run, place);
    return made;
  }

  /* The pair before or after one: as the table has them, else as the cards have; null at an end. */
  function beside(run, place, by) {
    const order = state.order.includes(place) ? state.order : lossOf(run).worst;
    const at_ = order.indexOf(place);
    return at_ < 0 ? null : order[at_ + by] ?? null;
  }

  function fillTexts(made, run, place) {
    const pairs = pairsOf(run), tokens = pairs.tokens[String(indexOf(run, place))], heavy = [];
    if (!pairs.texts && !tokens) {
      made.querySelector(".texts").replaceWith(element("p", "The run folder holds no texts.", "note"));
      return;
    }
    write(made.querySelector(".text.prompt"), run, "prompt", place);
    const prompt = textOf(run, "prompt", place);
    made.querySelector(".fold").open = state.printing || prompt.length <= FOLDED;
    made.querySelector(".fold summary").textContent = `Prompt (${prompt.length} characters)`;
    for (const side of ["chosen", "rejected"]) {
      const box = made.querySelector(`.text.${side}`);
      if (!tokens?.[side]) write(box, run, side, place);
      else heavy.push(paint(box, side, tokens[side]));
    }
    if (!tokens && pairs.texts) markWords(made, textOf(run, "chosen", place), textOf(run, "rejected", place));
    if (heavy.length) made.querySelector(".heaviest").textContent = `Share of c: ${heavy.join(" ")} Red adds to the entanglement, underlined blue takes away.`;
  }

  /* Underline the words of either response that the other hasn't, in the order of both. */
  function markWords(made, chosen, rejected) {
    const words = [chosen, rejected].map((text) => text.split(/(\s+)/));
    if (!chosen.trim() || !rejected.trim() || Math.max(...words.map((own) => own.length)) > WORDS) return;
    const shared = commonWords(...words);
    ["chosen", "rejected"].forEach((side, i) => {
      made.querySelector(`.text.${side}`).replaceChildren(...words[i].map((word, at_) =>
        shared[i].has(at_) || !word.trim() ? document.createTextNode(word) : element("mark", word, "only")));
    });
  }

  /* Places of the longest common subsequence of words in both lists. */
  function commonWords(left, right) {
    const length = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
    for (let i = left.length - 1; i >= 0; i--) {
      for (let j = right.length - 1; j >= 0; j--) {
        length[i][j] = left[i] === right[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
      }
    }
    const found = [new Set(), new Set()];
    for (let i = 0, j = 0; i < left.length && j < right.length;) {
      if (left[i] === right[j]) { found[0].add(i++); found[1].add(j++); }
      else if (length[i + 1][j] >= length[i][j + 1]) i++;
      else j++;
    }
    return found;
  }

  /* A text, or in words why there is none to see. */
  function write(box, run, side, place) {
    const { texts, cut } = pairsOf(run), text = textOf(run, side, place);
    if (text.trim()) box.textContent = text;
    else if (!texts) box.append(element("span", "(the run folder holds no texts)", "missing"));
    else if (text) box.append(element("span", `(nothing but white space, ${text.length} characters)`, "missing"));
    else box.append(element("span", cut === 0 ? "(left out, so that the file stays small)" : "(empty)", "missing"));
  }

  /* Tokens with a background as strong as their share of c; what the colours say is also said in words. */
  function paint(box, side, tokens) {
    const most = Math.max(...tokens.share.map((share) => Math.abs(share ?? 0))) || 1;
    tokens.text.forEach((text, i) => {
      const share = tokens.share[i] ?? 0, mark = element("mark", text);
      mark.style.backgroundColor = `rgba(var(${share < 0 ? "--less" : "--more"}), ${((0.75 * Math.abs(share)) / most).toFixed(3)})`;
      if (share < 0) mark.style.textDecoration = "underline dotted";
      mark.title = `${signed(Number((100 * share).toFixed(1)))} % of c, log-prob ${number(tokens.logp[i], 3)}`;
      box.append(mark);
    });
    const order = tokens.share.map((share, i) => [share ?? 0, i]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 4);
    const said = order.map(([share, i]) => `“${tokens.text[i].replaceAll("\n", "↵").replaceAll(" ", "␣")}” ${signed(Number((100 * share).toFixed(1)))} %`);
    return `${side} ${said.join(", ")}.`;
  }

  function showCards() {
    const run = state.run, worst = lossOf(run).worst;
    const chosen = byId("selected").firstElementChild;
    const places = worst.slice(0, state.printing ? Math.max(state.cards, 5) : state.cards).filter((place) => chosen?.id !== anchor(run, indexOf(run, place)));
    byId("cards").replaceChildren(...places.map((place) => card(run, place)));
    const { falling, label } = lossOf(run);
    const few = falling ? `The chosen log-prob of only ${falling} ${falling === 1 ? "pair" : "pairs"} falls` : "No pair's chosen log-prob falls";
    const others = worst.length > falling ? " Then come those with the least slack." : "";
    byId("few").textContent = falling < 5 ? `${few} under ${label}.${others}` : "";
    byId("more").hidden = worst.length <= state.cards;
  }

  /* Open the pair that the address names, for instance #pair-17 or #run2-pair-17. */
  function openHash() {
    const found = /^#(?:run(\d+)-)?pair-(\d+)(?:\?|$)/.exec(location.hash);
    if (!found || !withPairs.length) return;
    const run = found[1] ? Number(found[1]) - 1 : 0, index = Number(found[2]);
    if (!withPairs.includes(run)) return;
    if (run !== state.run) choose(run, state.loss);
    for (const old of document.querySelectorAll(".card.target")) old.classList.remove("target");
    let target = byId("cards").querySelector(`#${anchor(run, index)}`);
    if (!target) {
      const place = placeOf(run, index);
      if (place < 0) {
        const why = pairsOf(run).count < pairsOf(run).scored ? "not in this page's sample, or " : "";
        target = element("p", `Pair ${index} isn't here: ${why}not scored.`, "said");
        target.tabIndex = -1;
      } else {
        target = card(run, place);
        const close = target.querySelector(".close");
        close.hidden = false;
        close.addEventListener("click", () => { byId("selected").replaceChildren(); remember("worst"); showCards(); });
      }
      byId("selected").replaceChildren(target);
    } else byId("selected").replaceChildren();
    target.classList.add("target");
    target.scrollIntoView({ block: "start" });
    target.focus({ preventScroll: true });
    remember();
  }

  function go(run, index) {
    if (place_() === anchor(run, index)) openHash();
    else location.hash = `#${anchor(run, index)}`;
  }

  // --- the address: #place?loss=...&regime=...&sort=-cosine ----------------------------------------------------------

  const FILTERS = ["words", "regime", "epoch", "kind", "least", "flag"];
  const place_ = () => location.hash.slice(1).split("?")[0];

  /* Write what is shown into the address, at the place that it names or at another one. */
  function remember(place = place_()) {
    const said = new URLSearchParams();
    if (state.run !== withPairs[0]) said.set("run", state.run + 1);
    if (state.loss !== state.labels[0]) said.set("loss", state.loss);
    for (const name of FILTERS) if (byId(name).value) said.set(name, name === "regime" || name === "epoch" ? content.regimes[byId(name).value].name : byId(name).value);
    if (state.sort !== "index" || !state.up) said.set("sort", (state.up ? "" : "-") + state.sort);
    history.replaceState(null, "", `#${place}${said.size ? `?${said}` : ""}`);
  }

  /* Show what the address says; without any parameters it says nothing about that. */
  function restore() {
    const [, query] = location.hash.split("?");
    if (query !== undefined) {
      const said = new URLSearchParams(query), run = Number(said.get("run") ?? withPairs[0] + 1) - 1;
      const own = withPairs.includes(run) ? run : withPairs[0], loss = said.get("loss");
      choose(own, state.labels.includes(loss) ? loss : state.labels[0]);
      for (const name of FILTERS) {
        const value = said.get(name) ?? "", code = content.regimes.findIndex((regime) => regime.name === value);
        const isKnown = name !== "least" || (value && Number.isFinite(Number(value)));
        byId(name).value = name === "regime" || name === "epoch" ? (code < 0 ? "" : String(code)) : isKnown ? value : "";
      }
      const sort = said.get("sort") ?? "index";
      state.up = !sort.startsWith("-");
      state.sort = columnsOf(own).includes(sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "index";
      arrange();
    }
    if (/^(?:run\d+-)?pair-\d+$/.test(place_())) openHash();
    else if (query !== undefined) byId(place_())?.scrollIntoView();
  }

  // --- what is shown, taken along ------------------------------------------------------------------------------------

  /* A cell of a CSV file; what a spreadsheet would take for a formula is preceded by an apostrophe. */
  function cell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return isInfinite(value) ? (value > 0 ? "inf" : "-inf") : String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function csv() {
    const run = state.run, loss = lossOf(run), names = columnsOf(run), sides = pairsOf(run).texts ? ["prompt", "chosen", "rejected"] : [];
    const named = (code) => content.regimes[code]?.name ?? "";
    const rows = state.order.map((place) => [
      ...names.map((name) => name === "regime" ? named(Number(loss.regimes[place])) : name === "epoch" ? named(Number(loss.epochs[place])) : valueOf(run, name, place)),
      loss.label, ...sides.map((side) => textOf(run, side, place)),
    ]);
    return [[...names, "loss", ...sides], ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

  /* The command that leaves out of the data what is shown; what a rule can't say is named. */
  function command() {
    const run = state.run, loss = lossOf(run), rules = [], missing = [], kind = byId("kind").value;
    const kindName = kind && pairsOf(run).columns.kind.names[Number(kind)];
    if (byId("regime").value) rules.push(`regime==${content.regimes[byId("regime").value].name}`);
    if (kindName) (/^\S+$/.test(kindName) && Number.isNaN(Number(kindName)) ? rules : missing).push(`kind==${kindName}`);
    if (byId("least").value) rules.push(`cosine>=${byId("least").valueAsNumber}`);
    if (byId("flag").value) rules.push(byId("flag").value);
    if (byId("words").value.trim()) missing.push("the text");
    if (byId("epoch").value) missing.push("the regime over an epoch");
    const lost = missing.length ? `# a rule can't say: ${missing.join(", ").replace(/[\r\n]+/g, " ")}\n` : "";
    if (!rules.length) return `${lost}# choose a regime, a cosine or a flag: then the command stands here`;
    return `${lost}entangle filter ${quoted(content.runs[run].path)} --loss ${quoted(loss.spec)} --drop ${quoted(rules.join(" and "))} --out FILE`;
  }

  // --- table of pairs ------------------------------------------------------------------------------------------

  /* On paper there is no room for the columns that only this run has. */
  const columnsOf = (run) => [
    ...content.columns.map((column) => column.name),
    ...(lossOf(run).epochs ? ["epoch"] : []),
    ...(state.printing ? [] : content.runs[run].extra.map((extra) => extra.name)),
    ...(pairsOf(run).columns.kind && !state.printing ? ["kind"] : []),
  ];

  function head(name, text, term) {
    const cell = element("th"), button = element("button", text);
    button.type = "button";
    cell.scope = "col";
    cell.dataset.column = name;
    cell.dataset.added = "";
    cell.setAttribute("aria-sort", "none");
    cell.append(button);
    if (term) {
      const link = element("a", "?", "term mark");
      link.href = `#def-${term}`;
      link.setAttribute("aria-label", `Definition of ${text}`);
      cell.append(" ", link);
    }
    return cell;
  }

  function showHeads() {
    const heads = byId("heads");
    for (const old of heads.querySelectorAll("[data-added]")) old.remove();
    if (lossOf(state.run).epochs) heads.append(head("epoch", "over an epoch", "across"));
    for (const extra of content.runs[state.run].extra) heads.append(head(extra.name, extra.text, extra.term));
    if (pairsOf(state.run).columns.kind) heads.append(head("kind", "kind"));
    if (pairsOf(state.run).texts) {
      const cell = element("th", "texts begin");
      cell.scope = "col";
      cell.dataset.added = "";
      heads.append(cell);
    }
  }

  /* The choices of a filter, with how many pairs each keeps; what was chosen stays chosen where it still is one. */
  function fillSelect(select, options) {
    const chosen = select.value;
    select.replaceChildren(select.options[0], ...options.map(([value, text, count]) => new Option(`${text} (${count})`, value)));
    select.value = options.some(([value]) => value === chosen) ? chosen : "";
    select.closest("label").hidden = options.length < 2 && select.id !== "flag" || !options.length;
  }

  /* That a page holds a part of the pairs only, wherever that part is shown; nothing where it holds all. */
  const sample = (run) => pairsOf(run).count < pairsOf(run).scored ? ` (a sample of the ${pairsOf(run).scored} scored, with the worst)` : "";

  /* Which pairs are shown, and in which order. */
  function arrange() {
    const run = state.run, pairs = pairsOf(run), loss = lossOf(run);
    const words = byId("words").value.trim().toLowerCase(), regime = byId("regime").value, kind = byId("kind").value;
    const least = byId("least").valueAsNumber, flag = byId("flag").value, epoch = loss.epochs ? byId("epoch").value : "";
    const flagged = flag ? new Set(pairs.columns.flags[flag]) : null;
    const matches = (place) =>
      (!regime || loss.regimes[place] === regime) && (!epoch || loss.epochs[place] === epoch) && (!kind || String(pairs.columns.kind.codes[place]) === kind) &&
      (Number.isNaN(least) || at(pairs.columns.cosine, place) >= least) && (!flagged || flagged.has(place)) &&
      (!words || String(indexOf(run, place)) === words ||
        ["prompt", "chosen", "rejected"].some((side) => textOf(run, side, place).toLowerCase().includes(words)));
    const keys = new Map();
    state.order = [...Array(pairs.count).keys()].filter(matches);
    for (const place of state.order) keys.set(place, valueOf(run, state.sort, place));
    const sign = state.up ? 1 : -1;
    state.order.sort((a, b) => {
      const left = keys.get(a), right = keys.get(b);
      if (left === right) return a - b;
      if (left === null) return 1;
      if (right === null) return -1;
      return (left < right ? -1 : 1) * sign;
    });
    byId("found").textContent = `${state.order.length} of ${pairs.count} pairs${sample(run)}`;
    byId("table").setAttribute("aria-rowcount", state.order.length + 1);
    for (const cell of byId("heads").querySelectorAll("[data-column]")) {
      cell.setAttribute("aria-sort", cell.dataset.column === state.sort ? (state.up ? "ascending" : "descending") : "none");
    }
    byId("rows").scrollTop = 0;
    byId("command").textContent = command();
    showRows();
  }

  function row(run, place, number_) {
    const made = element("tr"), loss = lossOf(run), regime = regimeOf(loss, place);
    made.setAttribute("aria-rowindex", number_ + 2);
    for (const name of columnsOf(run)) {
      if (name === "index") {
        const cell = element("th"), link = element("a", String(indexOf(run, place)));
        cell.scope = "row";
        link.href = `#${anchor(run, indexOf(run, place))}`;
        cell.append(link);
        made.append(cell);
      } else if (name === "regime" || name === "epoch") {
        const shown = name === "regime" ? regime : content.regimes[Number(loss.epochs[place])];
        const cell = element("td"), dot = element("span", undefined, "dot");
        if (shown) {
          dot.style.backgroundColor = shown.colour;
          cell.append(dot);
        }
        cell.append(shown?.text ?? "–");
        made.append(cell);
      } else {
        const value = valueOf(run, name, place);
        made.append(element("td", typeof value === "string" ? value : name.startsWith("change_") ? signed(value) : number(value)));
      }
    }
    if (pairsOf(run).texts && !state.printing) {
      made.append(element("td", ["prompt", "chosen"].map((side) => textOf(run, side, place).slice(0, 60)).join(" → ").replace(/\s+/g, " "), "words"));
      made.lastChild.dir = "auto";
    }
    return made;
  }

  function gap(rows) {
    const made = element("tr"), cell = element("td", undefined, "gap");
    made.setAttribute("aria-hidden", "true");
    cell.style.height = `${rows * ROW}px`;
    cell.colSpan = byId("heads").children.length;
    made.append(cell);
    return made;
  }

  function nothing() {
    const made = element("tr"), cell = element("td", "No pair matches these filters.");
    made.setAttribute("aria-hidden", "true"); // the count beside the filters says it too
    cell.colSpan = byId("heads").children.length;
    cell.style.textAlign = "left";
    made.append(cell);
    return made;
  }

  /* Only the rows in sight are in the document; when it is printed, the first ones. */
  function showRows() {
    const box = byId("rows"), total = state.order.length;
    const first = state.printing ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - 10);
    const last = Math.min(total, state.printing ? PRINTED : first + Math.ceil(box.clientHeight / ROW) + 20);
    const focused = box.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const rows = state.order.slice(first, last).map((place, i) => row(state.run, place, first + i));
    if (!total) rows.push(nothing());
    byId("body").replaceChildren(...(first ? [gap(first)] : []), ...rows, ...(last < total && !state.printing ? [gap(total - last)] : []));
    if (focused) byId("body").querySelector(`a[href="${focused}"]`)?.focus({ preventScroll: true });
    document.querySelector(".printed").textContent = total > PRINTED ? `Printed: the first ${PRINTED} of ${total}.` : "";
  }

  // --- controls ------------------------------------------------------------------------------------------------

  function showLegend() {
    const loss = lossOf(state.run), counts = content.regimes.map(() => 0);
    for (const code of loss.regimes) counts[Number(code)]++;
    byId("legend").replaceChildren(...content.regimes.flatMap((regime, code) => {
      if (!counts[code]) return [];
      const item = element("li"), colour = element("i");
      colour.style.backgroundColor = regime.colour;
      item.append(colour, `${regime.text} `, element("b", String(counts[code])));
      return [item];
    }));
    for (const place of document.querySelectorAll('[data-shown="loss"]')) place.textContent = loss.label;
    for (const place of document.querySelectorAll('[data-shown="by"]')) place.textContent = loss.epochs ? "an epoch" : "one step";
    for (const place of document.querySelectorAll('[data-shown="run"]')) {
      place.textContent = withPairs.length > 1 ? `, in ${content.runs[state.run].name}` : "";
    }
  }

  function choose(run, loss) {
    const isOtherLoss = loss !== state.loss;
    Object.assign(state, { run, loss, cards: 5 });
    byId("loss").value = loss;
    if (byId("run")) byId("run").value = String(run);
    byId("selected").replaceChildren();
    const pairs = pairsOf(run), codes = [...new Set(lossOf(run).regimes)].sort();
    const regimes = lossOf(run).regimes, kind = pairs.columns.kind, flags = Object.entries(pairs.columns.flags);
    fillSelect(byId("regime"), codes.map((code) => [code, content.regimes[Number(code)].text, regimes.split(code).length - 1]));
    const epochs = lossOf(run).epochs ?? "";
    fillSelect(byId("epoch"), [...new Set(epochs)].sort().filter((code) => content.regimes[Number(code)]).map((code) => [code, content.regimes[Number(code)].text, epochs.split(code).length - 1]));
    fillSelect(byId("kind"), (kind?.names ?? []).map((name, code) => [String(code), name, kind.codes.filter((own) => own === code).length]));
    fillSelect(byId("flag"), flags.map(([name, places]) => [name, name.replaceAll("_", " "), places.length]));
    if (!columnsOf(run).includes(state.sort)) state.sort = "index";
    showHeads();
    showLegend();
    showCards();
    arrange();
    if (isOtherLoss) drawAll();
  }

  /* What a reader has chosen: shown, and kept in the address. */
  function act(change) {
    change();
    remember();
  }

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function showTheme() {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-pressed", String(isDark()));
  }

  function define(link) {
    const box = byId("definition"), entry = document.querySelector(link.getAttribute("href"));
    const place = link.getBoundingClientRect();
    box.replaceChildren(element("strong", entry.querySelector("dt").textContent), ...[...entry.querySelector("dd").children].map((part) => part.cloneNode(true)));
    box.hidden = false;
    box.style.left = `${Math.max(8, Math.min(scrollX + place.left, scrollX + root.clientWidth - box.offsetWidth - 16))}px`;
    box.style.top = `${scrollY + place.bottom + 6}px`;
    box.opener = link;
    box.focus({ preventScroll: true });
  }

  function closeDefinition(refocus) {
    const box = byId("definition");
    if (box.hidden) return;
    box.hidden = true;
    if (refocus) box.opener.focus({ preventScroll: true });
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!byId("definition").contains(event.target)) closeDefinition(false);
    if (link?.classList.contains("term")) {
      event.preventDefault();
      define(link);
    } else if (link && withPairs.length && link.getAttribute("href") === `#${place_()}`) openHash();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") closeDefinition(true); });

  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  let resized = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(resized);
    resized = requestAnimationFrame(() => { if (!state.printing) drawAll(); });
  });

  function print(isPrinting) {
    state.printing = isPrinting;
    for (const more of document.querySelectorAll("figure details")) {
      more.open = isPrinting && more.querySelectorAll("thead th").length <= PRINTED_COLUMNS;
    }
    drawAll();
    if (withPairs.length) { showCards(); showRows(); }
    for (const fold of document.querySelectorAll(".fold")) fold.open ||= isPrinting;
    const used = new Set([...document.querySelectorAll("main a.term")].map((link) => link.getAttribute("href").slice(5)));
    for (const entry of document.querySelectorAll(".glossary > div")) entry.toggleAttribute("data-unused", isPrinting && !used.has(entry.id.slice(4)));
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  showTheme();
  if (withPairs.length) {
    const labels = [...new Set(withPairs.flatMap((run) => pairsOf(run).losses.map((loss) => loss.label)))];
    byId("loss").replaceChildren(...labels.map((label) => new Option(label, label)));
    byId("loss").addEventListener("change", (event) => act(() => choose(state.run, event.target.value)));
    if (byId("run")) {
      byId("run").replaceChildren(...withPairs.map((run) => new Option(content.runs[run].name, String(run))));
      byId("run").addEventListener("change", (event) => act(() => choose(Number(event.target.value), state.loss)));
    }
    byId("more").addEventListener("click", () => { state.cards += 5; showCards(); });
    byId("filters").addEventListener("input", () => act(arrange));
    byId("filters").addEventListener("reset", () => setTimeout(() => act(arrange), 0));
    byId("csv").addEventListener("click", () => keep(csv(), "text/csv", "pairs.csv"));
    for (const form of [byId("filters"), byId("controls")]) form.addEventListener("submit", (event) => event.preventDefault());
    byId("heads").addEventListener("click", (event) => {
      const column = event.target.closest("button")?.parentElement.dataset.column;
      if (!column) return;
      state.up = state.sort === column ? !state.up : true;
      state.sort = column;
      act(arrange);
    });
    let waiting = false;
    byId("rows").addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; showRows(); });
    });
    state.labels = labels;
    choose(state.run, labels[0]);
    addEventListener("hashchange", restore);
    restore();
  }
  root.dataset.ready = "all";
})();
