// As much of a browser as the chat page uses, for tests/test_chat_page.py: the page's elements, built from its template, in
// any number of tabs with one storage; a clock that only the test turns; fetches that only the test answers. What is not
// here throws instead of being undefined, and is noted in `world.missing`, as the page may catch it.

let world;

function start(page, source) {
  world = {
    page,
    source,
    tabs: [],
    storage: new Map(),
    room: Infinity,
    forbidden: false,
    touch: false,
    clock: 1e12,
    ids: 0,
    missing: [],
  };
}

function missing(what) {
  world.missing.push(what);
  throw new Error("the stand-in has no " + what);
}

const strict = {
  get(target, key, receiver) {
    if (!(key in target) && typeof key === "string") missing(`${target.constructor.name}.${key}`);
    return Reflect.get(target, key, receiver);
  },
  set(target, key, value, receiver) {
    if (!(key in target)) missing(`${target.constructor.name}.${key} to set`);
    return Reflect.set(target, key, value, receiver);
  },
};

class Strict {
  constructor(properties) {
    return new Proxy(Object.assign(this, properties), strict);
  }
}

// Not live, but no array either.
const nodeList = (nodes) =>
  new Proxy(
    { ...nodes, length: nodes.length, [Symbol.iterator]: () => nodes.values(), forEach: (run) => nodes.forEach(run) },
    { get: (list, key) => (key in list || /^-?\d+$/.test(String(key)) ? list[key] : missing(`NodeList.${String(key)}`)) },
  );

const error = (name, Kind = Error) => Object.assign(new Kind(name), { name });

// ---- events ----------------------------------------------------------------------------------------------------------

class Event extends Strict {
  target = null;
  defaultPrevented = false;
  constructor(type, properties = {}) {
    super({ type, bubbles: true, ...properties });
  }
  preventDefault() {
    this.defaultPrevented = true;
  }
}

class Target extends Strict {
  listeners = [];
  parentNode = null;
  addEventListener(type, run, { once = false, ...others } = {}) {
    if (Object.keys(others).length) missing("listener option " + Object.keys(others));
    this.listeners.push({ type, run, once });
  }
  // Whether the default action follows.
  dispatchEvent(event) {
    event.target = this;
    for (let node = this; node; node = event.bubbles ? node.parentNode : null) {
      for (const listener of node.listeners.filter(({ type }) => type === event.type)) {
        if (listener.once) node.listeners.splice(node.listeners.indexOf(listener), 1);
        listener.run(event);
      }
    }
    return !event.defaultPrevented;
  }
}

class AbortSignal extends Target {
  aborted = false;
}

class AbortController extends Strict {
  signal = new AbortSignal();
  abort() {
    if (this.signal.aborted) return;
    this.signal.aborted = true;
    this.signal.dispatchEvent(new Event("abort"));
  }
}

// ---- nodes -----------------------------------------------------------------------------------------------------------

class Node extends Target {
  remove() {
    const nodes = this.parentNode?.nodes;
    nodes?.splice(nodes.indexOf(this), 1);
    this.parentNode = null;
  }
  get nextSibling() {
    return this.parentNode.nodes[this.parentNode.nodes.indexOf(this) + 1] ?? null;
  }
  after(...nodes) {
    const next = this.nextSibling;
    for (const node of nodes) this.parentNode.insertBefore(node, next);
  }
  replaceWith(...nodes) {
    this.after(...nodes);
    this.remove();
  }
}

class Text extends Node {
  nodes = [];
  isEqualNode(other) {
    return other instanceof Text && other.textContent === this.textContent;
  }
}

class Element extends Node {
  nodes = [];
  attributes = new Map();
  style = new Strict({ height: "" });
  scrollTop = 0;
  scrollHeight = 0;
  clientHeight = 0;
  getAttribute(name) {
    return this.attributes.get(name) ?? null;
  }
  setAttribute(name, value) {
    this.attributes.set(name, String(value));
  }
  get childNodes() {
    return nodeList(this.nodes);
  }
  get children() {
    return nodeList(this.nodes.filter((node) => node instanceof Element));
  }
  get lastChild() {
    return this.nodes.at(-1) ?? null;
  }
  insertBefore(node, next) {
    node.remove();
    this.nodes.splice(next ? this.nodes.indexOf(next) : this.nodes.length, 0, node);
    node.parentNode = this;
  }
  append(...nodes) {
    for (const node of nodes) this.insertBefore(node instanceof Node ? node : new Text({ textContent: String(node) }), null);
  }
  replaceChildren(...nodes) {
    while (this.lastChild) this.lastChild.remove();
    this.append(...nodes);
  }
  get textContent() {
    return this.nodes.map((node) => node.textContent).join("");
  }
  set textContent(text) {
    this.replaceChildren(...[text ?? ""].filter((text) => text !== ""));
  }
  // Only what renderMarkdown may make: anything else, and so anything that it did not escape, throws.
  set innerHTML(html) {
    this.replaceChildren();
    const open = [this];
    const piece = /<(\/?)([a-z][a-z0-9]*)((?: [a-z-]+="[^"<>]*")*)>|([^<>]+)|[^]/g;
    const plain = (text) =>
      text.replace(
        /&(\w+|#39);|&/g,
        (all, name) => ({ amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'" })[name] ?? missing(all),
      );
    for (const [all, close, tag, attributes, text] of html.matchAll(piece)) {
      if (text) open.at(-1).append(plain(text));
      else if (close) open.at(-1).localName === tag && open.length > 1 ? open.pop() : missing(all);
      else if (tag) {
        const node = this.ownerDocument.createElement(tag);
        for (const [, name, value] of attributes.matchAll(/ ([a-z-]+)="([^"]*)"/g)) node.setAttribute(name, plain(value));
        open.at(-1).append(node);
        if (tag !== "br") open.push(node);
      } else missing(`parsing of ${html}`);
    }
    if (open.length > 1) missing("end of " + html);
  }
  isEqualNode(other) {
    const attributes = (node) => JSON.stringify([...node.attributes].sort());
    if (!(other instanceof Element) || other.localName !== this.localName || attributes(other) !== attributes(this))
      return false;
    return other.nodes.length === this.nodes.length && this.nodes.every((node, i) => node.isEqualNode(other.nodes[i]));
  }
  get classList() {
    const names = () => this.className.split(" ").filter(Boolean);
    return new Strict({
      contains: (name) => names().includes(name),
      toggle: (name, on = missing("toggle without a state")) =>
        (this.className = [...names().filter((other) => other !== name), ...(on ? [name] : [])].join(" ")),
    });
  }
  get dataset() {
    return new Proxy(
      {},
      { get: () => missing("dataset to read"), set: (_, name, value) => (this.setAttribute("data-" + name, value), true) },
    );
  }
  querySelectorAll(selector) {
    const steps = selector.replaceAll(">", " > ").trim().split(/\s+/);
    const simple = (node, step) => {
      if (step === ":scope") return node === this;
      if (!/^[a-z]*(\.[\w-]+)?$/.test(step)) missing("selector " + selector);
      const [tag, name] = step.split(".");
      return (!tag || node.localName === tag) && (!name || node.classList.contains(name));
    };
    const matches = (node, i) => {
      if (!simple(node, steps[i])) return false;
      if (i === 0) return true;
      if (steps[i - 1] === ">") return Boolean(node.parentNode) && matches(node.parentNode, i - 2);
      return ancestors(node).some((other) => matches(other, i - 1));
    };
    return nodeList(descendants(this).filter((node) => matches(node, steps.length - 1)));
  }
  querySelector(selector) {
    return this.querySelectorAll(selector)[0] ?? null;
  }
  click() {
    if ((this instanceof Button && this.disabled) || !this.dispatchEvent(new Event("click"))) return;
    const form = ancestors(this).find((node) => node.localName === "form");
    if (!(this instanceof Button) || this.type !== "submit" || !form) return;
    const wrong = descendants(form).find((node) => node instanceof Input && !node.valid);
    if (wrong) return wrong.focus();
    if (form.dispatchEvent(new Event("submit")) && form.getAttribute("method") === "dialog")
      form.parentNode.close(this.getAttribute("value"));
  }
  focus() {
    if (focusable(this)) this.ownerDocument.focused = this;
  }
  scrollIntoView() {}
}

function reflect(Kind, read, write, names) {
  for (const name of names) {
    const attribute = name === "className" ? "class" : name.replace("aria", "aria-").toLowerCase();
    Object.defineProperty(Kind.prototype, name, {
      get() {
        return read(this.getAttribute(attribute));
      },
      set(value) {
        write(this, attribute, value);
      },
    });
  }
}

const set = (node, name, value) => node.setAttribute(name, value);
const toggle = (node, name, on) => (on ? node.setAttribute(name, "") : node.attributes.delete(name));
const ifAny = (value) => value ?? "";
reflect(Element, ifAny, set, ["id", "className", "title", "tabIndex"]);
reflect(Element, (value) => value, set, ["ariaLabel", "ariaCurrent"]);
reflect(Element, (value) => value !== null, toggle, ["hidden", "inert"]);

class Button extends Element {
  until; // the page's own
}
reflect(Button, (value) => value ?? "submit", set, ["type"]);
reflect(Button, (value) => value !== null, toggle, ["disabled"]);

class Textarea extends Element {
  value = "";
  setSelectionRange(from, to) {
    if (from !== this.value.length || to !== from) missing("selection but at the end");
  }
}

class Output extends Element {
  get value() {
    return this.textContent;
  }
  set value(value) {
    this.textContent = String(value);
  }
}

class Input extends Element {
  text = "";
  get value() {
    return this.text;
  }
  set value(value) {
    this.text = this.getAttribute("type") === "range" ? this.inRange(value) : String(value);
  }
  inRange(value) {
    const [min, max, step] = ["min", "max", "step"].map((name) => Number(this.getAttribute(name)));
    const number = value === "" || Number.isNaN(Number(value)) ? (min + max) / 2 : Number(value);
    const steps = (value) => (Math.min(Math.max(value, min), max) - min) / step;
    const nearest = Math.min(Math.round(steps(number)), Math.floor(steps(max) + 1e-9));
    return String(Number((min + nearest * step).toFixed(9)));
  }
  get valid() {
    if (!this.text) return this.getAttribute("required") === null;
    return new RegExp(`^(?:${this.getAttribute("pattern") ?? ".*"})$`, "v").test(this.text);
  }
}

class Dialog extends Element {
  returnValue = "";
  showModal() {
    if (this.open) throw error("InvalidStateError");
    this.open = true;
    descendants(this).find(focusable)?.focus();
  }
  close(value = this.returnValue) {
    if (!this.open) return;
    this.returnValue = value;
    this.open = false;
    this.ownerDocument.tab.later(() => this.dispatchEvent(new Event("close", { bubbles: false })));
  }
}
reflect(Dialog, (value) => value !== null, toggle, ["open"]);

const KINDS = { button: Button, textarea: Textarea, output: Output, input: Input, dialog: Dialog };
const descendants = (node) => [...node.children].flatMap((child) => [child, ...descendants(child)]);
const ancestors = (node) => (node.parentNode ? [node.parentNode, ...ancestors(node.parentNode)] : []);

function focusable(node) {
  const all = [node, ...ancestors(node)];
  const modal =
    all.at(-1) === node.ownerDocument && descendants(node.ownerDocument).find((other) => other instanceof Dialog && other.open);
  const shown = all.every((other) => !other.hidden && !other.inert && !(other instanceof Dialog && !other.open));
  const takes = ["button", "textarea", "input"].includes(node.localName) || node.tabIndex || node.localName === "a";
  return Boolean(
    takes &&
    all.at(-1) === node.ownerDocument &&
    shown &&
    !(node instanceof Button && node.disabled) &&
    (!modal || all.includes(modal)),
  );
}

class Document extends Element {
  focused = null;
  constructor(tab) {
    super({ tab, localName: "#document" });
    this.append(this.build(world.page));
  }
  createElement(tag) {
    return new (KINDS[tag] ?? Element)({ ownerDocument: this, localName: tag });
  }
  build([tag, attributes, ...children]) {
    const node = this.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value ?? "");
    node.append(...children.map((child) => (typeof child === "string" ? child : this.build(child))));
    return node;
  }
  getElementById(id) {
    return descendants(this).find((node) => node.id === id) ?? missing("element #" + id);
  }
  get documentElement() {
    return this.nodes[0];
  }
  get body() {
    return this.documentElement.querySelector("body");
  }
  get activeElement() {
    return this.focused && focusable(this.focused) ? this.focused : this.body;
  }
}

// ---- what else a page has --------------------------------------------------------------------------------------------

function storage(tab) {
  const change = (key, value) => {
    for (const other of world.tabs)
      if (other !== tab) other.later(() => other.window.dispatchEvent(new Event("storage", { key })));
    value === undefined ? world.storage.delete(key) : world.storage.set(key, value);
  };
  const methods = new Strict({
    getItem: (key) => world.storage.get(key) ?? null,
    removeItem: (key) => change(key),
    setItem(key, value) {
      const size = [...new Map(world.storage).set(key, value)].flat().join("").length;
      if (size > world.room) throw error("QuotaExceededError");
      change(key, String(value));
    },
  });
  return new Proxy(
    {},
    {
      get: (_, key) => methods[key],
      ownKeys: () => [...world.storage.keys()],
      getOwnPropertyDescriptor: (_, key) => ({ value: world.storage.get(key), enumerable: true, configurable: true }),
    },
  );
}

// A server's answer as it comes in. Of a TextDecoderStream only this is known: it puts together what was cut.
class TextDecoderStream extends Strict {
  rest = [];
  decode(bytes) {
    const all = [...this.rest, ...bytes];
    const lead = all.findLastIndex((byte) => byte < 0x80 || byte >= 0xc0);
    const length = all[lead] >= 0xf0 ? 4 : all[lead] >= 0xe0 ? 3 : all[lead] >= 0xc0 ? 2 : 1;
    this.rest = lead + length > all.length ? all.splice(lead) : [];
    return decodeURIComponent(all.map((byte) => "%" + byte.toString(16).padStart(2, "0")).join(""));
  }
}

class Exchange extends Strict {
  queue = [];
  wake = null;
  aborted = false;
  constructor(path, options) {
    const { method = "GET", headers = {}, body = "", signal, ...others } = options;
    if (Object.keys(others).length) missing("fetch option " + Object.keys(others));
    super({ path, method, headers, body, ...Promise.withResolvers() });
    const abort = () => {
      this.aborted = true;
      this.put(error("AbortError"));
    };
    signal?.aborted ? abort() : signal?.addEventListener("abort", abort);
  }
  // Bytes, null at the end, or an error; before the head of the answer has come only an error.
  put(item) {
    if (item instanceof Error) this.reject(item);
    this.queue.push(item);
    this.wake?.();
  }
  head(status, text = null) {
    const read = async (decoder) => {
      for (;;) {
        while (!this.queue.length) await new Promise((resolve) => (this.wake = resolve));
        const item = this.queue.find((item) => item instanceof Error) ?? this.queue.shift();
        if (item instanceof Error) throw item;
        if (item === null) return { value: undefined, done: true };
        const value = decoder.decode(item);
        if (value) return { value, done: false };
      }
    };
    const body = new Strict({
      pipeThrough: (decoder) => new Strict({ getReader: () => new Strict({ read: () => read(decoder) }) }),
    });
    this.resolve({ ok: status < 300, status, json: async () => JSON.parse(text), body });
  }
}

class Window extends Target {
  constructor(tab) {
    super();
    const own = {
      document: tab.document,
      history: new Strict({ state: tab.state, replaceState: (state) => (tab.state = state) }),
      navigator: new Strict({ clipboard: new Strict({ writeText: async (text) => tab.copy(text) }) }),
      crypto: new Strict({ randomUUID: () => `id-${++world.ids}` }),
      performance: new Strict({ now: () => world.clock }),
      Date: new Strict({ now: () => world.clock }),
      setTimeout: (run, wait = 0) => void tab.later(run, wait),
      requestAnimationFrame: (run) => void tab.later(run, 16),
      matchMedia: (query) => new Strict({ matches: query === "(hover: none)" ? world.touch : missing(query) }),
      confirm: (text) => tab.confirm(text),
      fetch: (path, options) => tab.fetch(path, options),
      AbortController,
      TextDecoderStream,
    };
    for (const [name, value] of Object.entries({ window: this, ...own })) Object.defineProperty(this, name, { value });
    Object.defineProperty(this, "localStorage", {
      get() {
        if (world.forbidden) throw error("SecurityError");
        return storage(tab);
      },
    });
  }
}

// ---- a tab, and the person before it ---------------------------------------------------------------------------------

const INLINE = ["a", "code", "em", "strong", "span", "output"];

class Tab {
  tasks = [];
  exchanges = [];
  copied = [];
  asked = [];
  agree = null;
  state = null;

  constructor() {
    this.load();
  }
  load() {
    this.document = new Document(this);
    this.window = new Window(this);
    // Its own names first, then the window's, then the language's; any other is a ReferenceError.
    new Function("window", `with (window) { (function () { "use strict"; ${world.source}\n})(); }`)(this.window);
  }
  fire(type) {
    return this.window.dispatchEvent(new Event(type));
  }
  reload() {
    if (!this.fire("beforeunload") && !this.confirm("Leave?")) return;
    this.fire("pagehide");
    this.tasks = [];
    this.load();
  }

  later(run, wait = 0) {
    this.tasks.push({ at: world.clock + wait, run });
  }
  // Does the next thing due until then, if any. One by one, as what was promised happens between two calls from Python.
  step(until) {
    const due = this.tasks.filter(({ at }) => at <= until).sort((a, b) => a.at - b.at)[0];
    world.clock = Math.max(world.clock, due ? due.at : until);
    if (!due) return false;
    this.tasks.splice(this.tasks.indexOf(due), 1);
    due.run();
    return true;
  }

  fetch(path, options) {
    const exchange = new Exchange(path, options);
    this.exchanges.push(exchange);
    return exchange.promise;
  }
  request() {
    const { path, method, headers, body, aborted } = this.exchanges.at(-1);
    return { path, method, headers, body, aborted, number: this.exchanges.length };
  }
  respond(status, text) {
    this.exchanges.at(-1).head(status, text);
  }
  push(...pieces) {
    for (const piece of pieces) this.exchanges.at(-1).put(piece);
  }
  lose() {
    this.exchanges.at(-1).put(error("TypeError", TypeError));
  }

  confirm(text) {
    if (this.agree === null) throw new Error("nobody expected to be asked: " + text);
    this.asked.push(text);
    return this.agree;
  }
  copy(text) {
    if (this.copied === null) throw error("NotAllowedError");
    this.copied.push(text);
  }

  find(label, selector = "body") {
    const buttons = this.all(selector)
      .flatMap((node) => [node, ...descendants(node)])
      .filter((node) => node instanceof Button);
    const found = buttons.filter((node) => this.shown(node) && (node.ariaLabel ?? node.textContent) === label);
    if (found.length !== 1) throw new Error(`${found.length} buttons ${label} in ${selector}`);
    return found[0];
  }
  all(selector) {
    const [, id, number] = /^#([\w-]+)(?: (\d+))?$/.exec(selector) ?? [];
    if (number) return [this.document.getElementById(id).children[number]];
    return id ? [this.document.getElementById(id)] : [...this.document.querySelectorAll(selector)];
  }
  shown(node) {
    return [node, ...ancestors(node)].every((other) => !other.hidden && !(other instanceof Dialog && !other.open));
  }
  click(label, selector) {
    const node = this.find(label, selector);
    if (node.disabled) throw new Error(label + " is disabled");
    node.focus();
    node.click();
  }
  type(text, selector) {
    if (selector) this.all(selector)[0].focus();
    const node = this.document.activeElement;
    if (!("value" in node)) throw new Error("nowhere to type in");
    node.value = text;
    node.dispatchEvent(new Event("input"));
  }
  press(key, modifiers = {}) {
    const node = this.document.activeElement;
    const event = new Event("keydown", { key, shiftKey: false, ctrlKey: false, isComposing: false, ...modifiers });
    if (!node.dispatchEvent(event) || event.isComposing) return;
    if (key === "Enter" && node instanceof Textarea) this.type(node.value + "\n");
    if (key === "Enter" && node instanceof Button) node.click();
    if (key === "Enter" && node instanceof Input) {
      const form = ancestors(node).find((other) => other.localName === "form");
      descendants(form)
        .find((other) => other instanceof Button && other.type === "submit")
        ?.click();
    }
    if (key === "Escape")
      descendants(this.document)
        .find((other) => other instanceof Dialog)
        ?.close();
  }

  // What is seen of an element: [button], (button that is disabled), {field}.
  look(selector) {
    return this.all(selector).map((node) =>
      this.seen(node)
        .replace(/\s* \s*/g, " ")
        .trim(),
    );
  }
  items(selector) {
    return this.all(selector)
      .flatMap((list) => [...list.children])
      .map((node) =>
        this.seen(node)
          .replace(/\s* \s*/g, " ")
          .trim(),
      );
  }
  seen(node) {
    if (node instanceof Text) return node.textContent;
    if (node.hidden || (node instanceof Dialog && !node.open)) return "";
    if (node instanceof Button) return (node.disabled ? "(#)" : "[#]").replace("#", () => node.ariaLabel ?? node.textContent);
    if (node instanceof Textarea || node instanceof Input) return `{${node.value}}`;
    if (node.localName === "br") return "\n";
    if (node.className === "waiting") return " …";
    const inside = [...node.childNodes]
      .map((child) => (child instanceof Button ? ` ${this.seen(child)} ` : this.seen(child)))
      .join("");
    return INLINE.includes(node.localName) && !node.className ? inside : ` ${inside} `;
  }
  focused() {
    const node = this.document.activeElement;
    return node.ariaLabel ?? node.textContent;
  }
  // Every element inside, with its attributes.
  elements(selector) {
    return this.all(selector)
      .flatMap(descendants)
      .map((node) => [node.localName, Object.fromEntries(node.attributes)]);
  }
}
