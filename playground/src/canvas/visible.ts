// Text that comes from a model or a user, made visible: it is only ever put into text nodes, and characters
// that would move, hide or reorder what stands around them are shown as what they are.

// Controls but line feed and tab; and everything that changes the direction or is a line of its own.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const LINE_ENDS = /\r\n/g;

function named(character: string): string {
  const code = character.charCodeAt(0);
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** Return a text as it is shown in running text. */
export function visible(text: string): string {
  return text.replace(LINE_ENDS, "\n").replace(HIDDEN, named);
}

/** Return a token as its cell shows it: white space too has a shape there, and a marker is its name. */
export function cellText(token: string): string {
  if (isMarker(token)) return visible(token.slice(2, -2));
  return visible(token).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "\u00a0");
}

/** Whether a token is one of the markers that checkpoints write as <|name|>. */
export function isMarker(token: string): boolean {
  return /^<\|[^<>|]*\|>$/.test(token);
}
