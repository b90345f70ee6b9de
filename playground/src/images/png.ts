// The request that a finished picture carries: the text `sfumato` of a PNG.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEYWORD = "sfumato";

/** Return the JSON of the request that drew a PNG, or null if it carries none. */
export function requestOf(file: Uint8Array): string | null {
  if (!SIGNATURE.every((byte, index) => file[index] === byte)) return null;
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  let at = SIGNATURE.length;
  while (at + 12 <= file.length) {
    const length = view.getUint32(at);
    const kind = latin(file.subarray(at + 4, at + 8));
    const found = textOf(kind, file.subarray(at + 8, at + 8 + length));
    if (found !== null) return found;
    at += 12 + length;
  }
  return null;
}

function latin(bytes: Uint8Array): string {
  return String.fromCharCode(...bytes);
}

/** Return the text of a chunk of ours; iTXt holds UTF-8 behind five fields, tEXt Latin-1 behind the keyword. */
function textOf(kind: string, content: Uint8Array): string | null {
  if (kind !== "tEXt" && kind !== "iTXt") return null;
  const end = content.indexOf(0);
  if (end < 0 || latin(content.subarray(0, end)) !== KEYWORD) return null;
  if (kind === "tEXt") return new TextDecoder("latin1").decode(content.subarray(end + 1));
  const isCompressed = content[end + 1] !== 0;
  if (isCompressed) return null;
  const language = content.indexOf(0, end + 3);
  const translated = content.indexOf(0, language + 1);
  return new TextDecoder().decode(content.subarray(translated + 1));
}

export function bytesOf(base64: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
