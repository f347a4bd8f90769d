// The `openai` package of npm: node client.js URL. Prints what each situation gave, by its name.
import OpenAI from "openai";

const MODEL = "writer@3";
const user = (content) => [{ role: "user", content }];
const parameters = { type: "object", properties: { x: { type: "integer" } } };
const TOOLS = [{ type: "function", function: { name: "search", description: "Finds things.", parameters } }];

async function spoken(chunks) {
  let text = "";
  for await (const chunk of chunks) text += chunk.choices[0].delta.content ?? "";
  return text;
}

const situations = {
  async whole(chat) {
    return (await chat.create({ model: MODEL, messages: user("hi") })).choices[0].message.content;
  },
  async stream(chat) {
    return spoken(await chat.create({ model: MODEL, messages: user("hi"), stream: true }));
  },
  async tools(chat) {
    const answer = await chat.create({ model: MODEL, messages: user("TOOL"), tools: TOOLS });
    const call = answer.choices[0].message.tool_calls[0].function;
    return [call.name, call.arguments];
  },
  async choices(chat) {
    const answer = await chat.create({ model: MODEL, messages: user("hi"), n: 2 });
    return answer.choices.map((choice) => choice.message.content);
  },
  async settings(chat) {
    const asked = { stop: ["END"], seed: 7, temperature: 0.5, response_format: { type: "json_object" } };
    return (await chat.create({ model: MODEL, messages: user("hi"), ...asked })).choices[0].message.content;
  },
  async logprobs(chat) {
    const answer = await chat.create({ model: MODEL, messages: user("hi"), logprobs: true });
    return answer.choices[0].logprobs.content.map((token) => token.logprob);
  },
  async unasked(chat) {
    const answer = await chat.create({ model: MODEL, messages: user("hi") });
    return [answer.choices[0].logprobs, JSON.stringify(answer).includes("token_ids")];
  },
  async responses(_, client) {
    return (await client.responses.create({ model: MODEL, input: "hi" })).output_text;
  },
  async cancelled(chat) {
    const chunks = await chat.create({ model: MODEL, messages: user("SLOW"), stream: true });
    for await (const chunk of chunks) if (chunk.choices[0].delta.content === " there") break;
    return "left";
  },
  async many(chat) {
    const call = async () => spoken(await chat.create({ model: MODEL, messages: user("hi"), stream: true }));
    return [...new Set(await Promise.all(Array.from({ length: 100 }, call)))];
  },
};

const results = {};
for (const [name, situation] of Object.entries(situations)) {
  const client = new OpenAI({ baseURL: `${process.argv[2]}/rollout/${name}/attempt/a1/v1`, apiKey: "none" });
  results[name] = await situation(client.chat.completions, client);
}
console.log(JSON.stringify(results));
