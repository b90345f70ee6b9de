// What the engines' loops have done lately, as the server tells it while this is watched.
import { ApiFailure, told, watch } from "../api/client";
import type { Gauges, Step, StepsEvent } from "../api/types";
import { Observable } from "../observable";

// As many as the widest chart has columns.
const MAX_STEPS = 160;
const RATE_SECONDS = 3;
const RETRY_MILLISECONDS = 1500;

export class ModelMonitor {
  steps: Step[] = [];
  numSteps = 0;
  numDropped = 0;
  gauges: Gauges | null = null;
  isGone = false;
  #arrivals: { at: number; steps: number; tokens: number }[] = [];

  take(event: StepsEvent): void {
    // A launch without rows ran no forward.
    const ran = event.steps.filter((step) => step.rows > 0);
    this.steps = [...this.steps, ...ran].slice(-MAX_STEPS);
    this.numSteps += ran.length + event.num_dropped;
    this.numDropped += event.num_dropped;
    this.gauges = event.gauges ?? this.gauges;
    this.isGone = event.is_gone;
    const tokens = ran.reduce((sum, step) => sum + step.tokens, 0);
    this.#arrivals.push({ at: performance.now(), steps: ran.length + event.num_dropped, tokens });
  }

  /** Return steps and fed positions per second, over the last moments. */
  rates(): { steps: number; tokens: number } {
    const since = performance.now() - RATE_SECONDS * 1000;
    this.#arrivals = this.#arrivals.filter((each) => each.at >= since);
    const sum = (name: "steps" | "tokens") =>
      this.#arrivals.reduce((total, each) => total + each[name], 0) / RATE_SECONDS;
    return { steps: sum("steps"), tokens: sum("tokens") };
  }
}

export class Monitor extends Observable {
  readonly models = new Map<string, ModelMonitor>();
  problem: string | null = null;
  isOpen = false;

  /** Watch until the signal, and come back when the line breaks. */
  async watch(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        for await (const event of watch<StepsEvent>("/v1/engine/steps", signal)) this.#take(event);
        this.#break("the server has closed the line");
      } catch (error) {
        if (signal.aborted) return;
        this.#break(told(error));
        // Another key begins to watch anew.
        if (error instanceof ApiFailure && error.status === 401) return;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
    }
  }

  #take(event: StepsEvent): void {
    this.isOpen = true;
    this.problem = null;
    const found = this.models.get(event.model) ?? new ModelMonitor();
    this.models.set(event.model, found);
    found.take(event);
    this.changed();
  }

  #break(problem: string): void {
    this.isOpen = false;
    this.problem = problem;
    this.changed();
  }
}
