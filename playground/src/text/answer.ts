// One answer while it is made: its text, its canvas step by step, and what it cost.
import { post, told } from "../api/client";
import { writeBody } from "../api/seeds";
import type { TextChunk, TextModel, Usage } from "../api/types";
import { Recording } from "../canvas/recording";
import { settingsBody, type Settings } from "../controls/values";
import { Observable } from "../observable";

export interface Message {
  role: "user" | "assistant";
  content: string;
}

export class Answer extends Observable {
  readonly recording = new Recording();
  text = "";
  usage: Usage | null = null;
  finishReason: string | null = null;
  failure: string | null = null;
  readonly seed: string;
  isRunning = true;
  readonly #abort = new AbortController();
  readonly #started = performance.now();
  #firstText: number | null = null;
  #ended: number | null = null;

  constructor(
    readonly model: TextModel,
    readonly settings: Settings,
    readonly name: string,
    /** What the answer draws from unless its settings say another. */
    drawnSeed: string,
  ) {
    super();
    this.seed = settings.fields["seed"] || drawnSeed;
  }

  get algorithm(): string {
    return this.settings.algorithm || this.model.default_algorithm;
  }

  /** Seconds until the first committed text. */
  get firstTextSeconds(): number | null {
    return this.#firstText === null ? null : (this.#firstText - this.#started) / 1000;
  }

  get seconds(): number {
    return ((this.#ended ?? performance.now()) - this.#started) / 1000;
  }

  stop(): void {
    this.#abort.abort();
  }

  /** Ask, and take in what comes until it ends, one way or another. */
  async run(messages: readonly Message[]): Promise<void> {
    try {
      const [path, body] = request(this.model, messages, this.settings);
      const chunks = post<TextChunk>(path, writeBody(body, this.seed), this.#abort.signal);
      for await (const chunk of chunks) this.#take(chunk);
    } catch (error) {
      this.failure = this.#abort.signal.aborted ? "stopped" : told(error);
    }
    this.isRunning = false;
    this.#ended = performance.now();
    this.recording.end();
    this.changed();
  }

  #take(chunk: TextChunk): void {
    this.usage = chunk.usage ?? this.usage;
    for (const choice of chunk.choices) {
      const text = choice.delta?.content ?? choice.text ?? "";
      if (text) {
        this.text += text;
        this.#firstText ??= performance.now();
      }
      if (choice.canvas) this.recording.push(choice.canvas);
      this.finishReason = choice.finish_reason ?? this.finishReason;
    }
    this.changed();
  }
}

/** Return where a conversation is answered, and the body; a model without a chat template continues a text. */
function request(
  model: TextModel,
  messages: readonly Message[],
  settings: Settings,
): [string, Record<string, unknown>] {
  const body = {
    model: model.id,
    ...settingsBody(model, settings),
    stream: true,
    stream_options: { include_usage: true, include_canvas: true },
  };
  if (model.has_chat_template) return ["/v1/chat/completions", { ...body, messages }];
  return ["/v1/completions", { ...body, prompt: messages.at(-1)?.content ?? "" }];
}
