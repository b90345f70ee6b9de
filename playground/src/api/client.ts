// Requests to the server that sent this page: the key, errors in its own words, server-sent events.
import { Observable } from "../observable";

const KEY_NAME = "sfumato-key";

/** The API key: asked for where the server wants one, and forgotten with this tab. */
class Key extends Observable {
  /** Why a key is asked for; null while none is. */
  wanted: string | null = null;

  get value(): string {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  }

  give(value: string): void {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
    this.wanted = null;
    this.changed();
  }

  ask(): void {
    this.wanted = this.value ? "That key is not one of this server's." : "This server asks for an API key.";
    this.changed();
  }
}

export const key = new Key();

/** What the server refused, with the field that it names. */
export class ApiFailure extends Error {
  constructor(
    message: string,
    readonly field: string | null,
    readonly status: number,
  ) {
    super(message);
  }
}

/** Return an error in words for a person. */
export function told(error: unknown): string {
  if (error instanceof ApiFailure) {
    return error.field === null ? error.message : `${error.message} (${error.field})`;
  }
  return error instanceof Error ? error.message : String(error);
}

function headers(): Record<string, string> {
  return key.value ? { Authorization: `Bearer ${key.value}` } : {};
}

async function failure(response: Response): Promise<ApiFailure> {
  if (response.status === 401) key.ask();
  try {
    const { error } = (await response.json()) as { error: { message: string; param: string | null } };
    return new ApiFailure(error.message, error.param, response.status);
  } catch {
    return new ApiFailure(`the server answered ${response.status}`, null, response.status);
  }
}

async function fetched(path: string, options: RequestInit): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiFailure("the server cannot be reached", null, 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function get<T>(path: string): Promise<T> {
  return (await fetched(path, { headers: headers() })).json() as Promise<T>;
}

/** Send a body, already written as JSON, and yield the events of the answer. */
export async function* post<T>(path: string, body: string, signal: AbortSignal): AsyncGenerator<T> {
  const sent = { ...headers(), "Content-Type": "application/json" };
  const response = await fetched(path, { method: "POST", headers: sent, body, signal });
  yield* events<T>(response);
}

/** Yield the events of a stream that has no body to send. */
export async function* watch<T>(path: string, signal: AbortSignal): AsyncGenerator<T> {
  yield* events<T>(await fetched(path, { headers: headers(), signal }));
}

/** Yield the JSON of each server-sent event. Throws ApiFailure for an event that is an error. */
async function* events<T>(response: Response): AsyncGenerator<T> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (held + value).split("\n\n");
      held = blocks.pop()!;
      for (const block of blocks) {
        const content = dataOf(block);
        if (content === "[DONE]") return;
        if (content) yield parsed<T>(content);
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

function dataOf(block: string): string {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

function parsed<T>(content: string): T {
  const value = JSON.parse(content) as T & { error?: { message: string; param: string | null } };
  if (value.error) throw new ApiFailure(value.error.message, value.error.param, 200);
  return value;
}
