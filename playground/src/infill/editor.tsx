// Where a text with gaps is written.
import type { ComponentChildren } from "preact";
import { useRef, useState } from "preact/hooks";
import type { TextModel } from "../api/types";
import { combinations, gapText, partsOf, type Part } from "./gaps";

// Of the embedded models: questions of the kinds they know, with answers that have gaps.
const EXAMPLES = [
  {
    name: "a sum",
    question: "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?",
    text: "12+7=[[2]]. [[2]]-4=[[1-3]]. The answer is [[2]].",
  },
  { name: "a sorted list", question: "Sort the words: pear kiwi apple fig", text: "apple[[1-4]] pear" },
  {
    name: "a record",
    question: "Mia, 34, nurse in Oslo",
    text: '{"name": "[[1]]", "age": [[2]], "job": "[[1]]", "city": "Oslo"}',
  },
];

interface Props {
  model: TextModel;
  onFill: (parts: Part[], question: string) => void;
}

function summary(parts: readonly Part[], count: number): string {
  const gaps = parts.filter((part) => typeof part !== "string").length;
  if (gaps === 0) return "Write a gap as [[4]], or [[2-6]] for a range of lengths in tokens.";
  if (count === 0) return "A gap has at least one token, and a range runs upwards.";
  const lengths = count === 1 ? "" : `, ${count} combinations of lengths, denoised in one batch`;
  return `${gaps} ${gaps === 1 ? "gap" : "gaps"}${lengths}`;
}

export function Editor({ model, onFill }: Props) {
  const [question, setQuestion] = useState(EXAMPLES[0]!.question);
  const [text, setText] = useState(EXAMPLES[0]!.text);
  const parts = partsOf(text);
  const count = combinations(parts);

  function submit(event: Event) {
    event.preventDefault();
    onFill(parts, question.trim());
  }

  return (
    <form class="editor" onSubmit={submit}>
      <Examples
        onChoose={(example) => {
          setQuestion(example.question);
          setText(example.text);
        }}
      />
      {model.has_chat_template && (
        <label class="field">
          <span>question (may be empty: then the text stands alone)</span>
          <input
            name="infill-question"
            value={question}
            onInput={(event) => setQuestion(event.currentTarget.value)}
          />
        </label>
      )}
      <GapText text={text} onText={setText} hint={summary(parts, count)}>
        <button type="submit" class="primary" disabled={count === 0 || !model.infill.is_supported}>
          Fill the gaps
        </button>
      </GapText>
    </form>
  );
}

function Examples({ onChoose }: { onChoose: (example: (typeof EXAMPLES)[number]) => void }) {
  return (
    <div class="examples">
      {EXAMPLES.map((example) => (
        <button type="button" class="chip" key={example.name} onClick={() => onChoose(example)}>
          {example.name}
        </button>
      ))}
    </div>
  );
}

interface GapTextProps {
  text: string;
  onText: (text: string) => void;
  hint: string;
  children: ComponentChildren;
}

/** The text itself, and what puts a gap where the cursor stands. */
function GapText({ text, onText, hint, children }: GapTextProps) {
  const area = useRef<HTMLTextAreaElement>(null);

  function insert(gap: string) {
    const { selectionStart = text.length, selectionEnd = text.length } = area.current ?? {};
    onText(text.slice(0, selectionStart) + gap + text.slice(selectionEnd));
    area.current?.focus();
  }

  return (
    <>
      <label class="field">
        <span>text with gaps</span>
        <textarea
          name="infill-text"
          class="mono"
          ref={area}
          rows={4}
          value={text}
          onInput={(event) => onText(event.currentTarget.value)}
        />
        <small>{hint}</small>
      </label>
      <div class="row">
        <InsertGap onInsert={insert} />
        {children}
      </div>
    </>
  );
}

function InsertGap({ onInsert }: { onInsert: (gap: string) => void }) {
  const [shortest, setShortest] = useState(2);
  const [longest, setLongest] = useState(4);
  const atLeast = Math.max(longest, shortest);
  return (
    <div class="row">
      <label class="small-number">
        from
        <input
          type="number"
          min={1}
          value={shortest}
          onInput={(event) => setShortest(Math.max(1, Number(event.currentTarget.value)))}
        />
      </label>
      <label class="small-number">
        to
        <input
          type="number"
          min={1}
          value={atLeast}
          onInput={(event) => setLongest(Number(event.currentTarget.value))}
        />
      </label>
      <button type="button" onClick={() => onInsert(gapText(shortest, atLeast))}>
        Insert a gap
      </button>
    </div>
  );
}
