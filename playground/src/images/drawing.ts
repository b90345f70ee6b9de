// One picture while it is drawn.
import { announce } from "../announce";
import { post, told } from "../api/client";
import { parseBody, writeBody } from "../api/seeds";
import type { ImageEvent } from "../api/types";
import { Observable } from "../observable";
import { bytesOf, requestOf } from "./png";

const NUM_PREVIEWS = 8;

export type Status = "drawing" | "done" | "failed" | "cancelled";

/** A request for a picture; the seed is kept as digits beside its other fields, empty where one is drawn. */
export interface Asked {
  body: Readonly<Record<string, unknown>>;
  seed: string;
}

export class Drawing extends Observable {
  readonly id = crypto.getRandomValues(new Uint32Array(2)).join("-");
  status: Status = "drawing";
  step = 0;
  numSteps = 0;
  numPreviews = 0;
  /** What can be seen so far: a preview, at the end the picture. */
  url: string | null = null;
  failure: string | null = null;
  file: Uint8Array<ArrayBuffer> | null = null;
  readonly #abort = new AbortController();

  constructor(
    readonly body: Asked["body"],
    readonly seed: string,
  ) {
    super();
  }

  get prompt(): string {
    return String(this.body["prompt"] ?? this.body["class_labels"] ?? "");
  }

  cancel(): void {
    this.#abort.abort();
  }

  /** The request as the finished file tells it, or null. */
  get recorded(): Asked | null {
    const json = this.file && requestOf(this.file);
    return json ? parseBody(json) : null;
  }

  async run(): Promise<void> {
    const asked = { ...this.body, stream: true, include_progress: true, partial_images: NUM_PREVIEWS };
    try {
      const body = writeBody(asked, this.seed);
      const events = post<ImageEvent>("/v1/images/generations", body, this.#abort.signal);
      for await (const event of events) this.#take(event);
    } catch (error) {
      this.status = this.#abort.signal.aborted ? "cancelled" : "failed";
      this.failure = told(error);
    }
    if (this.status === "drawing") {
      this.status = "failed";
      this.failure = "the stream ended before the picture came";
    }
    announce(`${this.status}: ${this.prompt}`);
    this.changed();
  }

  #take(event: ImageEvent): void {
    if (event.type.endsWith(".progress")) {
      this.step = event.step ?? this.step;
      this.numSteps = event.num_steps ?? this.numSteps;
    } else if (event.b64_json) {
      this.#show(bytesOf(event.b64_json), event.type.endsWith(".completed"));
    }
    this.changed();
  }

  #show(file: Uint8Array<ArrayBuffer>, isFinished: boolean): void {
    this.forget();
    this.url = URL.createObjectURL(new Blob([file], { type: "image/png" }));
    if (isFinished) {
      this.file = file;
      this.status = "done";
    } else {
      this.numPreviews += 1;
    }
  }

  /** Give back the memory of what is shown. */
  forget(): void {
    if (this.url !== null) URL.revokeObjectURL(this.url);
    this.url = null;
  }
}
