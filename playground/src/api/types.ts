// What the server says of itself and sends.

/** One choice that a request has, as /v1/models reports it: a field, or an algorithm's parameter. */
export interface Control {
  name: string;
  type: string;
  default: number | string | boolean | null;
  minimum?: number;
  maximum?: number;
  unit?: number;
  choices?: string[];
  doc?: string;
}

export interface Algorithm {
  name: string;
  parameters: Control[];
}

interface ModelBase {
  id: string;
  family: string;
  num_parameters: number;
  dtype: string;
  device: string;
}

export interface TextModel extends ModelBase {
  makes: "text";
  visibility: string;
  has_tokenizer: boolean;
  has_chat_template: boolean;
  context_length: number;
  block_length: number;
  default_algorithm: string;
  default_algorithm_parameters: Record<string, Control["default"]>;
  algorithms: Algorithm[];
  controls: Control[];
  infill: { is_supported: boolean; reason: string | null };
}

export interface ImageModel extends ModelBase {
  makes: "image";
  controls: Control[];
  fields: string[];
  num_classes: number;
  has_text: boolean;
}

interface VideoModel extends ModelBase {
  makes: "video";
}

export type Model = TextModel | ImageModel | VideoModel;

/** The open block after a step. */
export interface CanvasField {
  step: number;
  start: number;
  tokens: string[];
  confidence: number[];
  undecided: boolean[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  denoise_steps: number;
  nfe: number;
  tokens_per_forward: number;
}

/** A chunk of a chat's or a plain completion's stream. */
export interface TextChunk {
  id: string;
  seed: number;
  choices: {
    delta?: { content?: string };
    text?: string;
    canvas?: CanvasField;
    finish_reason: string | null;
  }[];
  usage?: Usage | null;
}

/** One combination of lengths: its layout, its canvas after a step, or how likely it is. */
export interface Candidate {
  index: number;
  lengths?: number[];
  tokens?: (string | null)[];
  canvas?: CanvasField;
  mean_logprob?: number;
  is_chosen?: boolean;
}

export interface InfillChunk {
  id: string;
  choices: { text: string; mean_logprob: number; gaps: { text: string }[] }[];
  candidates: Candidate[];
  usage?: Usage;
}

export interface ImageEvent {
  type: string;
  b64_json?: string;
  step?: number;
  num_steps?: number;
}

export interface StepShare {
  request_id: string;
  kind: string;
  rows: number;
  tokens: number;
}

export interface Step {
  launch_id: number;
  kind: string;
  rows: number;
  tokens: number;
  host_seconds: number;
  device_seconds: number;
  hidden_seconds: number;
  shares: StepShare[];
}

export interface Gauges {
  waiting: number;
  running: number;
  pages_free: number;
  pages_leased: number;
  pages_cached: number;
  retractions: number;
}

export interface StepsEvent {
  model: string;
  steps: Step[];
  num_dropped: number;
  gauges: Gauges | null;
  is_gone: boolean;
}
