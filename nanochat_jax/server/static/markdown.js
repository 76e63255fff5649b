// A small, safe subset of Markdown: text in, HTML out. Everything is escaped before any tag is added, so nothing that a
// model or a person writes can become markup. Left out: raw HTML, images, tables, footnotes.

const escapeHtml = (text) =>
  text.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]);

// HTML that is complete is set aside and a mark, "\0n\0", left in its place, so that no later rule looks into it.
function shelf() {
  const pieces = [];
  const putBack = (html) => html.replace(/\0(\d+)\0/g, (_, n) => pieces[n]);
  return { setAside: (html) => `\0${pieces.push(putBack(html)) - 1}\0`, putBack };
}

const emphasis = (html) =>
  html
    .replace(/\*\*(\S(?:.*?\S)?)\*\*(?!\*)/g, "<strong>$1</strong>")
    .replace(/(^|[\s(>])\*(\S(?:.*?\S)?)\*(?=$|[\s).,;:!?<])/g, "$1<em>$2</em>");

const CODE = /`+([^`\0]+)`+/g;
const LINK = /\[([^\]]+)\]\((https?:\/\/(?:[^\s()\0]|\([^\s()\0]*\))+)\)/g; // the address may have (brackets)

function inline(text, setAside) {
  const breaks = (html) => html.replace(/\n/g, "<br>");
  const coded = text.replace(CODE, (_, code) => setAside(`<code>${breaks(escapeHtml(code))}</code>`));
  const linked = escapeHtml(coded).replace(LINK, (_, label, url) =>
    setAside(`<a href="${url}" target="_blank" rel="noopener noreferrer">${emphasis(label)}</a>`),
  );
  return breaks(emphasis(linked));
}

const FENCE = /^(\s*(?:(?:[-*+]|\d+[.)])\s+)?)(`{3,})([^`]*)$/; // a list item may begin with it
const BLOCK = /^\s*\0\d+\0$/; // set aside
const HEADING = /^(#{1,4})\s+(.*)$/;
const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;

// The lines of a text, each fenced code block in them set aside as one line.
function fencesAside(text, setAside) {
  const source = text.replaceAll("\0", "").split("\n");
  const lines = [];
  for (let i = 0; i < source.length; i++) {
    const fence = FENCE.exec(source[i]);
    if (!fence) {
      lines.push(source[i]);
      continue;
    }
    const [, before, ticks, language] = fence;
    const end = new RegExp(`^\\s*${ticks}\`*\\s*$`); // it is still missing while an answer streams in
    const indent = new RegExp(`^\\s{0,${before.length}}`);
    const code = [];
    while (++i < source.length && !end.test(source[i])) code.push(source[i].replace(indent, ""));
    const html = `<pre data-language="${escapeHtml(language.trim())}"><code>${escapeHtml(code.join("\n"))}</code></pre>`;
    lines.push(before + setAside(html));
  }
  return lines;
}

const indent = (line) => /^\s*/.exec(line)[0].replaceAll("\t", "    ").length;

function list(lines, setAside) {
  const [ordered, own] = [ITEM.exec(lines[0])[1], indent(lines[0])];
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    const item = items.at(-1);
    if (match && indent(line) < own + 2) items.push({ text: match[2], below: [] });
    else if (match || item.below.length) item.below.push(line);
    else item.text += "\n" + line.trim();
  }
  const body = items.map(({ text, below }) => `<li>${inline(text, setAside)}${blocks(below, setAside)}</li>`).join("");
  return ordered ? `<ol start="${Number(ordered)}">${body}</ol>` : `<ul>${body}</ul>`;
}

function blocks(lines, setAside) {
  const html = [];
  let i = 0;
  const take = (wanted) => {
    const from = i;
    while (i < lines.length && wanted(lines[i])) i++;
    return lines.slice(from, i);
  };
  while (i < lines.length) {
    const heading = HEADING.exec(lines[i]);
    if (BLOCK.test(lines[i])) {
      html.push(lines[i++].trim());
    } else if (heading) {
      i++;
      html.push(`<h${heading[1].length + 2}>${inline(heading[2], setAside)}</h${heading[1].length + 2}>`);
    } else if (ITEM.test(lines[i])) {
      const [kind, own] = [Boolean(ITEM.exec(lines[i])[1]), indent(lines[i])];
      const belongs = (line) =>
        ITEM.test(line) && indent(line) < own + 2 ? Boolean(ITEM.exec(line)[1]) === kind : line.trim() && indent(line) >= 2;
      html.push(list(take(belongs), setAside));
    } else if (QUOTE.test(lines[i])) {
      const quoted = take((line) => QUOTE.test(line)).map((line) => QUOTE.exec(line)[1]);
      html.push(`<blockquote>${inline(quoted.join("\n"), setAside)}</blockquote>`);
    } else if (!lines[i].trim()) {
      i++;
    } else {
      const plain = (line) => line.trim() && ![BLOCK, HEADING, ITEM, QUOTE].some((rule) => rule.test(line));
      html.push(`<p>${inline(take(plain).join("\n"), setAside)}</p>`);
    }
  }
  return html.join("");
}

export function renderMarkdown(text) {
  const { setAside, putBack } = shelf();
  const html = blocks(fencesAside(text, setAside), setAside);
  // A code block in a list item begins and ends its own line.
  return putBack(html).replace(/(<\/pre>)<br>|<br>(<pre)/g, "$1$2");
}
