-- What the gateway reads of an inference over HTTP before Triton does: the JSON part of the binary form.
-- Triton 24.10 ends itself over data written as JSON (a shape beyond memory, brackets in brackets), so none passes.
local cjson = require("cjson.safe").new()
cjson.decode_max_depth(8)
cjson.decode_invalid_numbers(false)

local LONGEST_HEAD = 16384
local MOST_TENSORS = 8
local LONGEST_NAME = 100
local LARGEST_SIDE = 2147483647
local LENGTH_HEADER = "Inference-Header-Content-Length"

local function refuse(message)
    ngx.status = 400
    ngx.header["Content-Type"] = "application/json"
    ngx.print(cjson.encode({ error = message }))
    return ngx.exit(400)
end

local function whole(value, least, most)
    return type(value) == "number" and value % 1 == 0 and value >= least and value <= most
end

-- The length of a list; nil for anything else.
local function count(value)
    if type(value) ~= "table" then
        return nil
    end
    local keys = 0
    for _ in pairs(value) do
        keys = keys + 1
    end
    return keys == #value and keys or nil
end

-- The first `length` bytes of the body, which nginx keeps in memory or in a file.
local function read_head(length)
    local data = ngx.req.get_body_data()
    if data then
        return data:sub(1, length)
    end
    local path = ngx.req.get_body_file()
    local file = path and io.open(path, "rb")
    if not file then
        return ""
    end
    local head = file:read(length)
    file:close()
    return head or ""
end

-- Why an entry of `inputs` does not pass, or nil and its bytes in the body.
local function check_input(input)
    local name = type(input) == "table" and input.name
    if type(name) ~= "string" or name == "" or #name > LONGEST_NAME then
        return "an input has no usable name"
    end
    local where = "input '" .. name .. "': "
    if type(input.datatype) ~= "string" or input.datatype == "" then
        return where .. "datatype is missing"
    end
    local rank = count(input.shape)
    if not rank or rank > MOST_TENSORS then
        return where .. "shape is no list of at most " .. MOST_TENSORS .. " numbers"
    end
    for _, side in ipairs(input.shape) do
        if not whole(side, 1, LARGEST_SIDE) then
            return where .. "shape has a number that is not whole, below 1 or too large"
        end
    end
    local parameters = input.parameters
    if type(parameters) ~= "table" or not whole(parameters.binary_data_size, 0, LARGEST_SIDE) then
        return where .. "parameters.binary_data_size is missing; send tensors in the binary form"
    end
    for key in pairs(parameters) do
        if key ~= "binary_data_size" then
            return where .. "parameter '" .. tostring(key):sub(1, LONGEST_NAME) .. "' is not accepted here"
        end
    end
    return nil, parameters.binary_data_size
end

local function check_output(output)
    if type(output) ~= "table" or type(output.name) ~= "string" then
        return "an output has no usable name"
    end
    for key, value in pairs(output.parameters or {}) do
        if not (key == "binary_data" and type(value) == "boolean" or key == "classification" and whole(value, 0, 1e6)) then
            return "output '" .. output.name:sub(1, LONGEST_NAME) .. "': parameter '" .. tostring(key) .. "' is not accepted here"
        end
    end
end

-- Why the JSON part does not pass, or nil. `rest` is the number of bytes behind it.
local function check(head, rest)
    -- Decoders differ over a key that comes twice, so what must not be there is looked for in the text, and no escape may
    -- hide it.
    if head:find("\\", 1, true) then
        return "the JSON part has a backslash; send plain names"
    end
    if head:find('"data"', 1, true) then
        return "the JSON part has data in it; send tensors in the binary form"
    end
    local asked = cjson.decode(head)
    if type(asked) ~= "table" then
        return "the JSON part is not JSON, or not an object"
    end
    local inputs = count(asked.inputs)
    if not inputs or inputs == 0 or inputs > MOST_TENSORS then
        return "inputs is no list of 1 to " .. MOST_TENSORS .. " tensors"
    end
    local bytes = 0
    for _, input in ipairs(asked.inputs) do
        local fault, size = check_input(input)
        if fault then
            return fault
        end
        bytes = bytes + size
    end
    if bytes ~= rest then
        return "binary_data_size of all inputs is " .. bytes .. " bytes, the body has " .. rest
    end
    if asked.outputs ~= nil then
        local outputs = count(asked.outputs)
        if not outputs or outputs > MOST_TENSORS then
            return "outputs is no list of at most " .. MOST_TENSORS .. " tensors"
        end
        for _, output in ipairs(asked.outputs) do
            local fault = check_output(output)
            if fault then
                return fault
            end
        end
    end
    if asked.id ~= nil and type(asked.id) ~= "string" then
        return "id is no text"
    end
    for key, value in pairs(asked.parameters or {}) do
        if key ~= "binary_data_output" or type(value) ~= "boolean" then
            return "parameter '" .. tostring(key):sub(1, LONGEST_NAME) .. "' is not accepted here"
        end
    end
end

local given = ngx.req.get_headers()[LENGTH_HEADER]
if given == nil then
    return refuse(LENGTH_HEADER .. " is missing; send tensors in the binary form, not as JSON")
end
local length = type(given) == "string" and given:match("^[1-9]%d?%d?%d?%d?$") and tonumber(given)
if not length or length > LONGEST_HEAD then
    return refuse(LENGTH_HEADER .. " is not a number from 1 to " .. LONGEST_HEAD .. "; send the size of the JSON part")
end
local size = tonumber(ngx.var.content_length) or 0
if length > size then
    return refuse(LENGTH_HEADER .. " is " .. length .. ", above the " .. size .. " bytes of the body")
end
ngx.req.read_body()
local fault = check(read_head(length), size - length)
if fault then
    return refuse(fault)
end
