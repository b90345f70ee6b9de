// One text while its gaps are filled: a recording for each combination of lengths, and which one is taken.
import { announce } from "../announce";
import { post, told } from "../api/client";
import { drawSeed, writeBody } from "../api/seeds";
import type { Candidate, InfillChunk, TextModel, Usage } from "../api/types";
import { Recording } from "../canvas/recording";
import { settingsBody, type Settings } from "../controls/values";
import { Observable } from "../observable";
import type { Part } from "./gaps";

export interface Tried {
  index: number;
  lengths: number[];
  recording: Recording;
  meanLogprob: number | null;
  isChosen: boolean;
}

export class Filling extends Observable {
  tried: Tried[] = [];
  shown = 0;
  text: string | null = null;
  usage: Usage | null = null;
  failure: string | null = null;
  isRunning = true;
  readonly seed: string;
  readonly #abort = new AbortController();

  constructor(
    readonly model: TextModel,
    readonly settings: Settings,
  ) {
    super();
    this.seed = settings.fields["seed"] || drawSeed();
  }

  stop(): void {
    this.#abort.abort();
  }

  show(index: number): void {
    this.shown = index;
    this.changed();
  }

  /** Fill the gaps; with a question the parts are the answer to it. */
  async run(parts: readonly Part[], question: string): Promise<void> {
    const body = {
      model: this.model.id,
      parts,
      ...(question ? { messages: [{ role: "user", content: question }] } : {}),
      ...settingsBody(this.model, this.settings),
      stream: true,
      stream_options: { include_canvas: true },
    };
    try {
      const chunks = post<InfillChunk>("/v1/infill", writeBody(body, this.seed), this.#abort.signal);
      for await (const chunk of chunks) this.#take(chunk);
    } catch (error) {
      this.failure = this.#abort.signal.aborted ? "stopped" : told(error);
    }
    this.isRunning = false;
    for (const each of this.tried) each.recording.end();
    this.changed();
    announce(this.text === null ? (this.failure ?? "nothing was filled") : `Filled: ${this.text}`);
  }

  #take(chunk: InfillChunk): void {
    for (const candidate of chunk.candidates) this.#takeCandidate(candidate);
    const [choice] = chunk.choices;
    if (choice) {
      this.text = choice.text;
      this.usage = chunk.usage ?? null;
      this.shown = Math.max(0, this.tried.findIndex((each) => each.isChosen));
    }
    this.changed();
  }

  #takeCandidate(candidate: Candidate): void {
    const { index, lengths, tokens, canvas } = candidate;
    if (lengths && tokens) {
      const recording = new Recording(tokens);
      this.tried.push({ index, lengths, recording, meanLogprob: null, isChosen: false });
    }
    const found = this.tried.find((each) => each.index === index);
    if (!found) return;
    if (canvas) found.recording.push(canvas);
    found.meanLogprob = candidate.mean_logprob ?? found.meanLogprob;
    found.isChosen = candidate.is_chosen ?? found.isChosen;
  }
}
