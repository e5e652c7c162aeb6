"use strict";
/* Draws the page's figures, cards and table from the JSON beside it. Text from data goes through textContent only,
   and into plotly (which reads some tags) through plain(). */
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const withPairs = content.runs.map((run, number) => (run.pairs ? number : -1)).filter((number) => number >= 0);
  const state = { run: withPairs[0] ?? 0, loss: null, cards: 5, printing: false, sort: "index", up: true, order: [] };
  const ROW = 30, PRINTED = 60, PRINTED_COLUMNS = 8, PRINT_WIDTH = 660;

  // --- small helpers -------------------------------------------------------------------------------------------

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
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

  // --- figures -------------------------------------------------------------------------------------------------

  const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };

  function colours() {
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue(name).trim();
    return state.printing
      ? { ink: "#000000", quiet: "#444444", line: "#cccccc", card: "#ffffff" }
      : { ink: read("--ink"), quiet: read("--quiet"), line: read("--line"), card: read("--card") };
  }

  /* A colour of a figure as it is told from the page behind it. */
  const DARK = {
    "#2b5c8a": "#6ea8de", "#2b6cb0": "#6ea8de", "#c8382e": "#f0685c", "#8a4fbf": "#b68ae4", "#7a5230": "#b98a63", "#5f6b73": "#9aa6ae",
    "#f4f4f2": "#2a2f38",
  };
  const shade = (colour) => (state.printing || !isDark() ? colour : (DARK[colour.slice(0, 7)] ?? colour.slice(0, 7)) + colour.slice(7));

  function draw(key) {
    const figure = content.figures[key];
    const target = byId(`figure-${key}`);
    const colour = colours();
    const made = figure.live ? LIVE[figure.live](figure.run, colour) : figure;
    const own = (value) => JSON.parse(JSON.stringify(value), (_, item) =>
      item === "theme" ? colour.ink : typeof item === "string" && item.startsWith("#") ? shade(item) : item);
    const layout = {
      font: { family: "system-ui, sans-serif", size: 12, color: colour.ink }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 16, t: 58, b: 48 }, hoverlabel: { align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour.quiet, activecolor: colour.ink },
      showlegend: true, legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom" }, ...own(made.layout),
    };
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = {
        gridcolor: colour.line, zerolinecolor: colour.line, linecolor: colour.line, ticks: "outside", tickcolor: colour.line,
        ...layout[axis],
      };
    }
    if (state.printing) layout.width = Math.min(PRINT_WIDTH, target.clientWidth || PRINT_WIDTH);
    const isNew = !target.data;
    const drawn = Plotly.react(target, own(made.data), layout, CONFIG);
    if (isNew && figure.live) follow(target, key, figure.run);
    return drawn;
  }

  function drawAll(filter = () => true) {
    for (const key of Object.keys(content.figures)) if (filter(content.figures[key], key)) draw(key);
  }

  function drawInTurn(keys) {
    if (!keys.length) {
      root.dataset.ready = "all";
      return;
    }
    draw(keys[0]);
    setTimeout(() => drawInTurn(keys.slice(1)), 0);
  }

  /* Hover tells the pair's texts beside the figure; a click opens its card. */
  function follow(target, key, run) {
    target.on("plotly_hover", (event) => {
      const place = event.points[0].customdata?.[0];
      if (place === undefined) return;
      const parts = ["chosen", "rejected"].map((side) => `${side}: ${textOf(run, side, place).trim().slice(0, 110) || "(no text)"}`);
      byId(`beside-${key}`).textContent = `Pair ${indexOf(run, place)}. ${parts.join(" · ")}`;
    });
    target.on("plotly_click", (event) => {
      const place = event.points[0].customdata?.[0];
      if (place !== undefined) go(run, indexOf(run, place));
    });
  }

  /* One trace per regime; x, y: place -> number; hover: lines with %{customdata[1]}... of the columns given. */
  function marks(run, x, y, columns, hover) {
    const loss = lossOf(run);
    return content.regimes.map((regime, code) => {
      const places = [...Array(pairsOf(run).count).keys()].filter((place) => loss.regimes.charCodeAt(place) - 48 === code);
      return {
        type: "scatter", mode: "markers", name: `${regime.text} (${places.length})`, x: places.map(x), y: places.map(y),
        customdata: places.map((place) => [place, indexOf(run, place), ...columns.map((name) => number(valueOf(run, name, place)))]),
        hovertemplate: `pair %{customdata[1]}: ${regime.text}<br>${hover}<extra></extra>`,
        marker: { color: regime.colour, symbol: regime.mark, size: pairsOf(run).count > 3000 ? 4 : pairsOf(run).count > 200 ? 7 : 9, opacity: 0.8 },
      };
    }).filter((trace) => trace.x.length);
  }

  const height = (cosine) => -Math.acos(Math.max(-1, Math.min(1, cosine))); // near 1, where entangled pairs are, cosines crowd

  const LIVE = {
    plane(run, colour) {
      const loss = lossOf(run), columns = pairsOf(run).columns;
      const ratio = (place) => Math.log(at(columns.norm_ratio, place));
      const data = marks(
        run, ratio, (place) => height(at(columns.cosine, place)), ["cosine", "norm_ratio", "band_lower", "band_upper"],
        "cosine %{customdata[2]}, norm ratio %{customdata[3]}<br>ideal for rho from %{customdata[4]} to %{customdata[5]}",
      );
      const all = [...Array(pairsOf(run).count).keys()];
      const known = all.map(ratio).filter(Number.isFinite);
      const reach = Math.max(1, 1.08 * known.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
      const least = all.reduce((low, place) => Math.min(low, at(columns.cosine, place)), 0);
      if (loss.rho > 0 && !isInfinite(loss.rho)) {
        const middle = Math.log(loss.rho);
        const xs = [...Array(201).keys()].map((i) => -reach + (i * reach) / 100).concat(middle).sort((a, b) => a - b);
        data.unshift({
          type: "scatter", mode: "lines", x: xs, y: xs.map((x) => height(Math.exp(-Math.abs(x - middle)))), hoverinfo: "skip",
          name: `border of ideal, ${plain(loss.label)} (rho ${loss.rho_varies ? "median " : ""}${number(loss.rho, 3)})`,
          line: { color: colour.ink, width: 1.6, dash: loss.rho_varies ? "dash" : "solid" },
        });
      }
      const ticks = [1, 0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0, -0.25, -0.5, -0.75].filter((tick) => tick >= least - 0.1);
      const ratios = [1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 64].filter((tick) => Math.abs(Math.log(tick)) <= reach);
      return {
        data,
        layout: {
          hovermode: "closest", uirevision: "plane",
          xaxis: {
            title: { text: "norm ratio |g_l| / |g_w|" }, range: [-reach, reach], zeroline: false,
            tickvals: ratios.map(Math.log), ticktext: ratios.map((tick) => (tick < 1 ? `1/${1 / tick}` : String(tick))),
          },
          yaxis: {
            title: { text: "cosine" }, range: [height(Math.max(-1, least - 0.08)), 0.06], zeroline: false,
            tickvals: ticks.map(height), ticktext: ticks.map((tick) => number(tick)),
          },
        },
      };
    },

    changes(run, colour) {
      const loss = lossOf(run);
      const sizes = [...Array(pairsOf(run).count).keys()]
        .flatMap((place) => [at(loss.change_chosen, place), at(loss.change_rejected, place)].map(Math.abs))
        .filter((size) => size > 0).sort((a, b) => a - b);
      const unit = sizes[Math.floor(sizes.length / 5)] || 1, most = sizes.at(-1) || 1;
      const bend = (value) => Math.asinh(value / unit);
      const powers = [];
      for (let power = Math.ceil(Math.log10(unit)); power <= Math.log10(most); power++) powers.push(power);
      const shown = powers.filter((_, i) => i % Math.ceil(powers.length / 4) === 0);
      const tickvals = [...shown.map((p) => -bend(10 ** p)).reverse(), 0, ...shown.map((p) => bend(10 ** p))];
      const ticktext = [...shown.map((p) => `−10<sup>${p}</sup>`).reverse(), "0", ...shown.map((p) => `10<sup>${p}</sup>`)];
      const edge = 1.07 * bend(most);
      const axis = (title) => ({ title: { text: title }, tickvals, ticktext, range: [-edge, edge], zerolinecolor: colour.quiet });
      const corners = { ideal: [1, 0], both_up: [1, 1], both_down: [0, 0], inverted: [0, 1] };
      return {
        data: marks(
          run, (place) => bend(at(loss.change_chosen, place)), (place) => bend(at(loss.change_rejected, place)),
          ["change_chosen", "change_rejected"], "chosen %{customdata[2]}, rejected %{customdata[3]} nats per unit learning rate",
        ),
        layout: {
          hovermode: "closest", showlegend: false, xaxis: axis("change of the chosen, nats per unit learning rate"),
          yaxis: axis("change of the rejected"),
          annotations: content.regimes.filter((regime) => regime.name in corners).map((regime) => ({
            text: regime.text, xref: "paper", yref: "paper", x: corners[regime.name][0], y: corners[regime.name][1], showarrow: false,
            font: { color: regime.colour, size: 13 }, xanchor: corners[regime.name][0] ? "right" : "left",
          })),
        },
      };
    },
  };

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
    const item = element("div"), head = element("dt");
    if (key) {
      const link = element("a", name, "term");
      link.href = `#def-${key}`;
      head.append(link);
    } else head.textContent = name;
    item.append(head, element("dd", value));
    list.append(item);
  }

  function card(run, place) {
    const made = byId("card").content.firstElementChild.cloneNode(true);
    const index = indexOf(run, place), loss = lossOf(run), regime = regimeOf(loss, place), pairs = pairsOf(run);
    made.id = anchor(run, index);
    const link = made.querySelector(".anchor");
    link.textContent = `Pair ${index}`;
    link.href = `#${made.id}`;
    const badge = made.querySelector(".badge");
    badge.textContent = regime.text;
    badge.style.borderColor = regime.colour;
    made.querySelector(".reason").textContent = sentence(run, place);
    const list = made.querySelector(".facts");
    fact(list, "change, chosen", signed(at(loss.change_chosen, place)), "change");
    fact(list, "change, rejected", signed(at(loss.change_rejected, place)), "change");
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

  function fillTexts(made, run, place) {
    const pairs = pairsOf(run), tokens = pairs.tokens[String(indexOf(run, place))];
    if (!pairs.texts && !tokens) made.querySelector(".texts").remove();
    else made.querySelector(".text.prompt").textContent = textOf(run, "prompt", place) || "(not in the run folder)";
    if (!pairs.texts && !tokens) return;
    const heavy = [];
    for (const side of ["chosen", "rejected"]) {
      const box = made.querySelector(`.text.${side}`);
      if (!tokens?.[side]) box.textContent = textOf(run, side, place) || "(empty, or not in the run folder)";
      else heavy.push(paint(box, side, tokens[side]));
    }
    if (heavy.length) made.querySelector(".heaviest").textContent = `Share of c: ${heavy.join(" ")} Red adds to the entanglement, underlined blue takes away.`;
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
    const found = /^#(?:run(\d+)-)?pair-(\d+)$/.exec(location.hash);
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
        close.addEventListener("click", () => { byId("selected").replaceChildren(); history.replaceState(null, "", "#worst"); showCards(); });
      }
      byId("selected").replaceChildren(target);
    } else byId("selected").replaceChildren();
    target.classList.add("target");
    target.scrollIntoView({ block: "start" });
    target.focus({ preventScroll: true });
  }

  function go(run, index) {
    const hash = `#${anchor(run, index)}`;
    if (location.hash === hash) openHash();
    else location.hash = hash;
  }

  // --- table of pairs ------------------------------------------------------------------------------------------

  /* On paper there is no room for the columns that only this run has. */
  const columnsOf = (run) => [
    ...content.columns.map((column) => column.name),
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
    for (const extra of content.runs[state.run].extra) heads.append(head(extra.name, extra.text, extra.term));
    if (pairsOf(state.run).columns.kind) heads.append(head("kind", "kind"));
    if (pairsOf(state.run).texts) {
      const cell = element("th", "texts begin");
      cell.scope = "col";
      cell.dataset.added = "";
      heads.append(cell);
    }
  }

  function fillSelect(select, options) {
    select.replaceChildren(select.options[0], ...options.map(([value, text]) => new Option(text, value)));
    select.closest("label").hidden = !options.length;
  }

  /* Which pairs are shown, and in which order. */
  function arrange() {
    const run = state.run, pairs = pairsOf(run), loss = lossOf(run);
    const words = byId("words").value.trim().toLowerCase(), regime = byId("regime").value, kind = byId("kind").value;
    const least = byId("least").valueAsNumber, flag = byId("flag").value;
    const flagged = flag ? new Set(pairs.columns.flags[flag]) : null;
    const matches = (place) =>
      (!regime || loss.regimes[place] === regime) && (!kind || String(pairs.columns.kind.codes[place]) === kind) &&
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
    byId("found").textContent = `${state.order.length} of ${pairs.count} pairs`;
    byId("table").setAttribute("aria-rowcount", state.order.length + 1);
    for (const cell of byId("heads").querySelectorAll("[data-column]")) {
      cell.setAttribute("aria-sort", cell.dataset.column === state.sort ? (state.up ? "ascending" : "descending") : "none");
    }
    byId("rows").scrollTop = 0;
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
      } else if (name === "regime") {
        const cell = element("td"), dot = element("span", undefined, "dot");
        dot.style.backgroundColor = regime.colour;
        cell.append(dot, regime.text);
        made.append(cell);
      } else {
        const value = valueOf(run, name, place);
        made.append(element("td", typeof value === "string" ? value : name.startsWith("change_") ? signed(value) : number(value)));
      }
    }
    if (pairsOf(run).texts && !state.printing) {
      made.append(element("td", ["prompt", "chosen"].map((side) => textOf(run, side, place).slice(0, 60)).join(" → ").replace(/\s+/g, " "), "words"));
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

  /* Only the rows in sight are in the document; when it is printed, the first ones. */
  function showRows() {
    const box = byId("rows"), total = state.order.length;
    const first = state.printing ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - 10);
    const last = Math.min(total, state.printing ? PRINTED : first + Math.ceil(box.clientHeight / ROW) + 20);
    const focused = box.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const rows = state.order.slice(first, last).map((place, i) => row(state.run, place, first + i));
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
    fillSelect(byId("regime"), codes.map((code) => [code, content.regimes[Number(code)].text]));
    fillSelect(byId("kind"), (pairs.columns.kind?.names ?? []).map((name, code) => [String(code), name]));
    fillSelect(byId("flag"), Object.keys(pairs.columns.flags).map((name) => [name, name.replaceAll("_", " ")]));
    if (!columnsOf(run).includes(state.sort)) state.sort = "index";
    showHeads();
    showLegend();
    showCards();
    arrange();
    if (isOtherLoss) drawAll((figure, key) => figure.live && byId(`figure-${key}`).data);
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
    } else if (link && link.getAttribute("href") === location.hash) openHash();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") closeDefinition(true); });

  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { showTheme(); drawAll(); });

  function print(isPrinting) {
    state.printing = isPrinting;
    for (const more of document.querySelectorAll("figure details")) {
      more.open = isPrinting && more.querySelectorAll("thead th").length <= PRINTED_COLUMNS;
    }
    drawAll();
    if (withPairs.length) { showCards(); showRows(); }
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  showTheme();
  if (withPairs.length) {
    const labels = [...new Set(withPairs.flatMap((run) => pairsOf(run).losses.map((loss) => loss.label)))];
    byId("loss").replaceChildren(...labels.map((label) => new Option(label, label)));
    byId("loss").addEventListener("change", (event) => choose(state.run, event.target.value));
    if (byId("run")) {
      byId("run").replaceChildren(...withPairs.map((run) => new Option(content.runs[run].name, String(run))));
      byId("run").addEventListener("change", (event) => choose(Number(event.target.value), state.loss));
    }
    byId("more").addEventListener("click", () => { state.cards += 5; showCards(); });
    byId("filters").addEventListener("input", arrange);
    byId("filters").addEventListener("reset", () => setTimeout(arrange, 0));
    for (const form of [byId("filters"), byId("controls")]) form.addEventListener("submit", (event) => event.preventDefault());
    byId("heads").addEventListener("click", (event) => {
      const column = event.target.closest("button")?.parentElement.dataset.column;
      if (!column) return;
      state.up = state.sort === column ? !state.up : true;
      state.sort = column;
      arrange();
    });
    let waiting = false;
    byId("rows").addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; showRows(); });
    });
    choose(state.run, labels[0]);
    addEventListener("hashchange", openHash);
    openHash();
  }
  drawInTurn(Object.keys(content.figures));
})();
