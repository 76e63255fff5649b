// A small, safe subset of Markdown: text in, HTML out. Everything is escaped before any tag is added, so nothing that a
// model or a person writes can become markup. Left out: raw HTML, images, footnotes.

const escapeHtml = (text) =>
  text.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]);

function inline(text) {
  // Code spans are cut out first: what is in them is shown as it is.
  return text
    .split(/(`+[^`]+?`+)/)
    .map((piece, i) => {
      if (i % 2) return `<code>${escapeHtml(piece.replace(/^`+|`+$/g, ""))}</code>`;
      return escapeHtml(piece)
        .replace(/\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g, '<a href="$2" target="_blank" rel="noopener noreferrer">$1</a>')
        .replace(/\*\*(\S(?:.*?\S)?)\*\*/g, "<strong>$1</strong>")
        .replace(/(^|[\s(])\*(\S(?:.*?\S)?)\*(?=$|[\s).,;:!?])/g, "$1<em>$2</em>");
    })
    .join("");
}

const FENCE = /^\s*```(.*)$/;
const HEADING = /^(#{1,4})\s+(.*)$/;
const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;

function list(lines) {
  const ordered = ITEM.exec(lines[0])[1];
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match) items.push(match[2]);
    else items[items.length - 1] += "\n" + line.trim();
  }
  const body = items.map((item) => `<li>${inline(item).replace(/\n/g, "<br>")}</li>`).join("");
  return ordered ? `<ol start="${Number(ordered)}">${body}</ol>` : `<ul>${body}</ul>`;
}

export function renderMarkdown(text) {
  const lines = text.split("\n");
  const html = [];
  let i = 0;
  const take = (wanted) => {
    const from = i;
    while (i < lines.length && wanted(lines[i])) i++;
    return lines.slice(from, i);
  };
  while (i < lines.length) {
    const fence = FENCE.exec(lines[i]);
    const heading = HEADING.exec(lines[i]);
    if (fence) {
      i++;
      const code = take((line) => !FENCE.test(line)).join("\n");
      i++; // the closing fence, which is still missing while an answer streams in
      html.push(`<pre data-language="${escapeHtml(fence[1].trim())}"><code>${escapeHtml(code)}</code></pre>`);
    } else if (heading) {
      i++;
      html.push(`<h${heading[1].length + 2}>${inline(heading[2])}</h${heading[1].length + 2}>`);
    } else if (ITEM.test(lines[i])) {
      const kind = Boolean(ITEM.exec(lines[i])[1]);
      html.push(list(take((line) => (ITEM.test(line) ? Boolean(ITEM.exec(line)[1]) === kind : /^\s{2,}\S/.test(line)))));
    } else if (QUOTE.test(lines[i])) {
      const quoted = take((line) => QUOTE.test(line)).map((line) => QUOTE.exec(line)[1]);
      html.push(`<blockquote>${inline(quoted.join("\n")).replace(/\n/g, "<br>")}</blockquote>`);
    } else if (!lines[i].trim()) {
      i++;
    } else {
      const plain = (line) => line.trim() && ![FENCE, HEADING, ITEM, QUOTE].some((rule) => rule.test(line));
      html.push(`<p>${inline(take(plain).join("\n")).replace(/\n/g, "<br>")}</p>`);
    }
  }
  return html.join("");
}
