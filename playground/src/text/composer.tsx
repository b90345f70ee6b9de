// Where a question is written.
import { useEffect, useRef, useState } from "preact/hooks";
import type { TextModel } from "../api/types";

// What the embedded models were trained for; they know nothing else.
const EMBEDDED = "sfumato-tiny-";
const EXAMPLES = [
  "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?",
  "Mia, 34, nurse in Oslo",
  "Sort the words: pear apple fig",
];

interface Props {
  model: TextModel;
  isRunning: boolean;
  isEmpty: boolean;
  onAsk: (question: string) => void;
  onStop: () => void;
  onClear: () => void;
}

export function Composer({ model, isRunning, isEmpty, onAsk, onStop, onClear }: Props) {
  const [question, setQuestion] = useState("");
  const form = useRef<HTMLFormElement>(null);

  useEffect(() => {
    if (!isEmpty) form.current?.scrollIntoView({ block: "nearest" });
  }, [isRunning, isEmpty]);

  function ask(event: Event) {
    event.preventDefault();
    if (isRunning || question.trim() === "") return;
    onAsk(question);
    setQuestion("");
  }

  return (
    <form class="composer" ref={form} onSubmit={ask}>
      {isEmpty && model.id.startsWith(EMBEDDED) && <Examples onChoose={setQuestion} />}
      <div class="composer-row">
        <textarea
          name="question"
          rows={2}
          aria-label={model.has_chat_template ? "Your message" : "A text to continue"}
          placeholder={model.has_chat_template ? "Ask, then watch" : "A text to continue"}
          value={question}
          onInput={(event) => setQuestion(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
          }}
        />
        {isRunning ? (
          <button type="button" onClick={onStop}>
            Stop
          </button>
        ) : (
          <button type="submit" class="primary" disabled={question.trim() === ""}>
            Send
          </button>
        )}
        <button type="button" disabled={isEmpty} onClick={onClear}>
          Clear
        </button>
      </div>
    </form>
  );
}

function Examples({ onChoose }: { onChoose: (question: string) => void }) {
  return (
    <div class="examples">
      <span class="hint">This small model knows three kinds of questions:</span>
      {EXAMPLES.map((example) => (
        <button type="button" class="chip" key={example} onClick={() => onChoose(example)}>
          {example}
        </button>
      ))}
    </div>
  );
}
