-- The rules for an inference request over HTTP (http.lua) or gRPC (grpc.lua). Each model accepts only the tensors
-- listed here. A request that passes is rewritten in one fixed form.
local decoding = require("decoding")
local ffi = require("ffi")

local tensors = { MOST_JSON = 1048576 } -- bytes of data that are not in the binary form
local LARGEST_SIDE, MOST_SIDES, MOST_STRINGS, MOST_LABELS = 2147483647, 8, 4096, 100000
local ITEM = {
    UINT8 = { bytes = 1, ctype = "uint8_t[?]", least = 0, most = 255, whole = true },
    FP32 = { bytes = 4, ctype = "float[?]", least = -math.huge, most = math.huge },
}
-- A test compares MODELS with the model configs of classification and of segmentation. labels: the parameter "classification" is allowed,
-- with which Triton returns the best classes with labels instead of numbers. On an output of strings Triton 24.10 then
-- exits with SIGFPE.
tensors.MODELS = {
    student = {
        inputs = { image = "UINT8", strength = "FP32", adjustment = "FP32" },
        outputs = { logits = { labels = true }, feature = {}, feature_map = {}, class_map = {}, confidence = {} },
    },
    classifier = {
        inputs = {
            image = "BYTES", prior = "BYTES", strength = "FP32", target_prior = "FP32",
            coverage = "FP32", costs = "BYTES", ask = "FP32", false_alarms = "FP32", level = "FP32",
            explain = "UINT8",
        },
        outputs = {
            class = {}, index = {}, probability = {},
            set = {}, set_size = {}, decision = {}, decision_index = {}, expected_cost = {},
            unknown = {}, typicality = {}, node = {}, node_probability = {}, extras = {},
            nearest = {}, nearest_class = {}, nearest_cosine = {}, nearest_image = {}, activation_map = {},
            activation_crop = {},
        },
    },
    segmenter = {
        inputs = { image = "BYTES", prior = "BYTES", strength = "FP32", target_prior = "FP32" },
        outputs = {
            class = {}, index = {}, probability = {}, class_map = {}, confidence = {}, size = {}, names = {},
        },
    },
}

-- A name from the request for a message: quoted if it is safe to print, else a replacement.
function tensors.quoted(name)
    return type(name) == "string" and name:match("^[%w_.-]+$") and #name <= 100 and "'" .. name .. "'" or "with an invalid name"
end

function tensors.whole(value, least, most)
    return type(value) == "number" and value % 1 == 0 and value >= least and value <= most
end

local function reject(message)
    error({ rejected = message }, 0)
end
tensors.reject = reject

-- The number of elements of a shape.
local function elements_of(shape, where)
    if #shape > MOST_SIDES then
        reject(where .. "shape has more than " .. MOST_SIDES .. " dimensions")
    end
    local elements = 1
    for _, side in ipairs(shape) do
        if not tensors.whole(side, 1, LARGEST_SIDE) then
            reject(where .. "shape has a number that is not an integer from 1 to " .. LARGEST_SIDE)
        end
        elements = elements * side
    end
    return elements
end

-- Call each(offset, size) for the strings of a BYTES tensor. They must fill its bytes exactly: Triton 24.10 checks this
-- too, but then rejects every request of the batch.
local function each_string(source, input, expected, where, each)
    local offset, stop, count = input.offset, input.offset + input.size, 0
    while offset < stop and count <= expected do
        local first, second, third, fourth = source.read(offset, 4):byte(1, 4)
        if stop - offset < 4 or not fourth then
            reject(where .. "ends within the length of a string")
        end
        local size = first + 256 * (second + 256 * (third + 256 * fourth))
        if offset + 4 + size > stop then
            reject(where .. "has a string that is longer than its data")
        end
        each(offset + 4, size)
        offset, count = offset + 4 + size, count + 1
    end
    if count ~= expected then
        reject(where .. "has not exactly the " .. expected .. " strings of its shape")
    end
end

function tensors.length_prefix(size)
    return string.char(size % 256, math.floor(size / 256) % 256, math.floor(size / 65536) % 256, math.floor(size / 16777216))
end

-- Convert values of JSON or of gRPC's typed contents into the bytes of a tensor.
local function packed(values, datatype, where)
    local item, out = ITEM[datatype], {}
    for index, value in ipairs(values) do
        if item then
            if type(value) ~= "number" or value < item.least or value > item.most or item.whole and value % 1 ~= 0 then
                reject(where .. "data has a value that is not " .. datatype)
            end
        elseif type(value) ~= "string" then
            reject(where .. "data has a value that is not a string")
        else
            out[index] = tensors.length_prefix(#value) .. value
        end
    end
    return item and ffi.string(ffi.new(item.ctype, #values, values), #values * item.bytes) or table.concat(out)
end

local function check_input(input, request, source)
    local model = tensors.MODELS[request.model]
    local datatype = model.inputs[input.name]
    if not datatype then
        local names = {}
        for name in pairs(model.inputs) do
            table.insert(names, name)
        end
        table.sort(names)
        reject("input " .. tensors.quoted(input.name) .. " is not accepted; expected one or more of " .. table.concat(names, ", "))
    end
    local where = "input '" .. input.name .. "': "
    if input.datatype ~= datatype then
        reject(where .. "datatype " .. tensors.quoted(input.datatype) .. " is not accepted; expected " .. datatype)
    end
    local elements = elements_of(input.shape, where)
    if input.values then
        if #input.values ~= elements then
            reject(where .. "data has " .. #input.values .. " values; its shape requires " .. elements)
        end
        input.data = packed(input.values, datatype, where)
        input.offset, input.size = 0, #input.data
        source = { read = function(offset, count) return input.data:sub(offset + 1, offset + count) end }
    end
    if not input.offset then
        reject(where .. "data is missing")
    end
    if datatype == "BYTES" then
        if elements > MOST_STRINGS then
            reject(where .. "has more than " .. MOST_STRINGS .. " strings")
        end
        each_string(source, input, elements, where, function(offset, size)
            if input.name == "image" then
                request.pixels = request.pixels + decoding.pixels(source.read, offset, size, request)
            end
        end)
    elseif elements * ITEM[datatype].bytes ~= input.size then
        reject(where .. "has " .. input.size .. " bytes of data; its shape requires " .. elements * ITEM[datatype].bytes)
    end
end

-- Check a request {model, id, inputs, outputs}; rejects it if it breaks a rule. An input has name, datatype, shape and
-- either `offset` and `size` of its bytes in the source, or `values`, which become its `data`. Sets `pixels`, the
-- decoding cost.
function tensors.check(request, source)
    local model, seen = tensors.MODELS[request.model], {}
    request.pixels = 0
    if #request.inputs == 0 then
        reject("inputs are missing; expected a list of tensors")
    end
    for _, input in ipairs(request.inputs) do
        if input.name and seen[input.name] then
            reject("input '" .. input.name .. "' is given twice")
        end
        check_input(input, request, source)
        seen[input.name] = true
    end
    seen = {}
    for _, output in ipairs(request.outputs) do
        local rules = model.outputs[output.name]
        if not rules or seen[output.name] then
            reject("output " .. tensors.quoted(output.name) .. " is given twice, or does not exist in " .. request.model)
        elseif output.classification and not (rules.labels and tensors.whole(output.classification, 1, MOST_LABELS)) then
            reject("output '" .. output.name .. "': parameter 'classification' is not accepted here")
        end
        seen[output.name] = true
    end
    if request.id:find('[%z\1-\31"\\\127-\255]') or #request.id > 128 then
        reject("id is invalid; expected at most 128 printable ASCII characters without quotes and backslashes")
    end
end

-- Build the body for Triton over HTTP, as parts for body.replace; the form is the same for both protocols. Sets the
-- variable head_length to the length of the JSON part.
function tensors.rebuild(request)
    local inputs, outputs, parts = {}, {}, { "" }
    for index, input in ipairs(request.inputs) do
        inputs[index] = ('{"name":"%s","datatype":"%s","shape":[%s],"parameters":{"binary_data_size":%d}}'):format(
            input.name, input.datatype, table.concat(input.shape, ","), input.size
        )
        table.insert(parts, input.data or input)
    end
    for index, output in ipairs(request.outputs) do
        outputs[index] = ('{"name":"%s","parameters":{"binary_data":%s%s}}'):format(
            output.name, output.binary, output.classification and ',"classification":' .. output.classification or ""
        )
    end
    parts[1] = ('{"id":"%s","inputs":[%s],%s}'):format(
        request.id,
        table.concat(inputs, ","),
        #outputs > 0 and '"outputs":[' .. table.concat(outputs, ",") .. "]"
            or ('"parameters":{"binary_data_output":%s}'):format(request.binary)
    )
    ngx.var.head_length = #parts[1]
    return parts
end

-- Call parse(): returns its result; or nil, the message and the status (may be nil) of a rejected request.
function tensors.parsed(parse, ...)
    local valid, result = pcall(parse, ...)
    if valid then
        return result
    end
    if type(result) == "table" and result.rejected then
        return nil, result.rejected, result.status
    end
    error(result, 0)
end

return tensors
