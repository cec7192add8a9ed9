// The worker in which a page's model computes, so that the page stays free.
import { Model } from "./model.js";

let model = null;

async function answer(method, values) {
  if (method !== "load") return model[method](...values);
  model = await Model.load(...values);
  return model.description;
}

onmessage = async ({ data: { call, method, values } }) => {
  try {
    postMessage({ call, result: await answer(method, values) });
  } catch (error) {
    postMessage({ call, failure: error.message });
  }
};
